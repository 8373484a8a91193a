"""Hostile programs in the sandbox, one by one: each must end, and leave everything outside as it was.

Where a machine lacks a protection, the tests show instead that the sandbox is refused there.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.sandbox import skip_unless_it_holds

from experiments.tasks.code import sandbox
from experiments.tasks.code.protections import require_protections
from experiments.tasks.code.sandbox import Limits, Outcome, Request, run

ROOT = Path(__file__).resolve().parents[4]
# Programs that end by themselves have enough time even on a busy machine; those that never end get little.
PATIENT = Limits(seconds=60.0, memory_mib=256, disk_mib=4)
BRIEF = Limits(seconds=0.3, memory_mib=256, disk_mib=4)


@pytest.fixture(autouse=True)
def scratch_parent(tmp_path, monkeypatch):
    """The folder in which scratch folders are made; nothing may be left in it."""
    skip_unless_it_holds(lambda: require_protections(()))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == []


def ran(code: str, limits: Limits = PATIENT, **request) -> Outcome:
    return run(Request(code, **request), limits)


def printed(code: str, limits: Limits = PATIENT, **request) -> str:
    outcome = ran(code, limits, **request)
    assert outcome.ending == "finished"
    return outcome.output.decode()


def assert_refused(*attempts: str) -> None:
    """Assert that every attempt, a Python expression, raises PermissionError."""
    lines = ["import os, shutil, signal, socket, subprocess, sys, tempfile"]
    for attempt in attempts:
        lines += ["try:", f"    print({attempt!r}, {attempt})", "except PermissionError:", "    print('refused')"]
    assert printed("\n".join(lines)).splitlines() == ["refused"] * len(attempts)


# --- what works ---------------------------------------------------------------------------------


def test_a_program_reads_its_input_and_prints():
    assert printed("import sys\nprint(input(), sys.stdin.read(), sys.argv[1:])", input="a\nb é") == "a b é []\n"


def test_a_program_is_the_main_module():
    code = (
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
        "if __name__ == '__main__': print(pickle.loads(pickle.dumps(A(3))).x)"
    )
    assert printed(code) == "3\n"


@pytest.mark.parametrize("end", ["exit()", "quit()", "exit(0)", "import sys; sys.exit()", "raise SystemExit"])
def test_a_program_may_end_early(end):
    assert printed(f"print(1)\n{end}\nprint(2)") == "1\n"


def test_a_function_is_called_and_what_it_prints_is_left_out():
    code = "print('at the top')\ndef f(a, b):\n    print('inside')\n    return {'sum': (a + b, None)}"
    assert printed(code, entry_point="f", arguments=(1, 2.5)) == '{"sum": [3.5, null]}'


def test_a_method_is_called_on_a_new_instance():
    code = (
        "class Solution:\n    def twice(self, a):\n        return 2 * a\nif __name__ == '__main__': raise SystemExit(1)"
    )
    assert printed(code, entry_point="Solution.twice", arguments=("ab",)) == '"abab"'


def test_integers_have_any_number_of_digits():
    digits = "7" * 5000
    assert printed("print(int(input()) + 1)", input=digits) == digits[:-1] + "8\n"
    sevens = 7 * (10**5000 - 1) // 9
    assert printed("def f(n): return [n, 1]", entry_point="f", arguments=(sevens,)) == f"[{digits}, 1]"


def test_a_preamble_runs_first_and_defines_no_answer():
    preamble = "from math import *\nclass Solution:\n    def gcd(self, a, b): return 1"
    assert printed("from __future__ import annotations\nprint(gcd(4, 6))", preamble=preamble) == "2\n"
    call = {"preamble": preamble, "arguments": (4, 6)}
    assert printed("def f(a, b): return gcd(a, b)", entry_point="f", **call) == "2"
    assert ran("", entry_point="gcd", **call) == ran("", entry_point="Solution.gcd", **call) == Outcome("failed", b"")


def test_the_library_works_with_threads_and_files_in_the_scratch_folder():
    code = (
        "import bisect, collections, datetime, decimal, fractions, functools, heapq, itertools, math, os, random, re\n"
        "import statistics, string, sys, threading, typing, zlib\n"
        "threading.stack_size(64 << 20)\nsys.setrecursionlimit(10**6)\n"
        "def deep(n): return 0 if n == 0 else 1 + deep(n - 1)\n"
        "thread = threading.Thread(target=lambda: print(deep(50_000)))\nthread.start()\nthread.join()\n"
        "open('file', 'w').write('kept')\nprint(open('file').read(), os.listdir('.') == ['file'])\n"
        "print(os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR'])"
    )
    assert printed(code) == "50000\nkept True\nTrue\n"


def test_sets_of_text_have_the_same_order_in_every_run():
    code = "print([*{str(number) for number in range(50)}])"
    assert printed(code) == printed(code)


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(1)",
        "exit(1)",
        "1 / 0",
        "this is not Python",
        "import numpy",
        "\x00",
        "\ud800",
        "(" * 100_000,
        "print('right')\nimport os; os.abort()",
        "import ctypes; ctypes.string_at(0)",
        "def f(n): return f(n + 1)\nf(0)",
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
    ],
)
def test_what_fails_has_failed_whatever_it_printed(code):
    assert ran(code) == Outcome("failed", b"")


@pytest.mark.parametrize(
    "code",
    [
        "g = 1",
        "f = 1",
        "def f(): return {1, 2}",
        "def f(x): return x",
        "def f(): raise SystemExit(3)",
        "a = []; a.append(a)\ndef f(): return a",
        "raise ValueError",
    ],
)
def test_a_call_without_a_result_has_failed(code):
    assert ran(code, entry_point="f") == Outcome("failed", b"")


# --- time and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(1e6)",
        "9 ** 9 ** 9",
        "import contextlib, signal\nfor number in range(1, 65):\n    with contextlib.suppress(OSError, ValueError):\n"
        "        signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
        "import threading\nthreading.Thread(target=threading.Event().wait).start()",
        "import atexit, time\natexit.register(time.sleep, 1e6)",
        "import os\nr, w = os.pipe()\nos.read(r, 1)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_what_never_ends_is_ended(code):
    assert ran(code, BRIEF) == Outcome("time", b"")


def test_cpu_time_of_all_threads_counts():
    code = (
        "import hashlib, threading\ndef burn():\n    while True: hashlib.sha256(bytes(10**7))\n"
        "for _ in range(8): threading.Thread(target=burn).start()"
    )
    assert ran(code, Limits(seconds=1.0)).ending in ("failed", "time")


@pytest.mark.parametrize(
    "code", ["bytearray(1 << 30)", "a = []\nwhile True: a.append(bytes(10**6))", "a = 'x'\nwhile True: a += a"]
)
def test_memory_is_bounded(code):
    assert ran(code) == Outcome("failed", b"")


def test_limits_cannot_be_raised():
    code = (
        "import resource\n"
        "for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):\n"
        "    try: resource.setrlimit(limit, (resource.RLIM_INFINITY,) * 2)\n"
        "    except (ValueError, PermissionError): print('refused')\n"
    )
    assert printed(code) == "refused\n" * 4


def test_a_stricter_limit_of_the_machine_stays():
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n"
        "from experiments.tasks.code.sandbox import Limits, Request, run\n"
        "program = 'import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))'\n"
        "print(run(Request(program), Limits(seconds=60.0, files=64)).output.decode())"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.strip() == "(48, 48)", process.stderr


def test_code_has_no_privileges_even_if_root_runs_it():
    code = (
        "import os\nos.close(os.open('file', os.O_CREAT | os.O_WRONLY, 0))\n"  # a file that its owner may not read
        "try: open('file')\nexcept PermissionError: print('refused')"
    )
    assert printed(code) == "refused\n"


# --- processes ----------------------------------------------------------------------------------


def test_no_process_can_be_started():
    assert_refused(
        "os.fork() or os._exit(0)",
        "os.forkpty()[0] or os._exit(0)",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run([sys.executable, '-c', 'pass'])",
        "os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    )
    assert printed("import os; print(os.system('true') == 0)") == "False\n"


def test_a_fork_bomb_makes_no_process():
    forks = "    try: os.fork()\n    except OSError: pass\n"
    assert ran(f"import os\nwhile True:\n{forks}", BRIEF).ending == "time"
    assert len(printed(f"import os\nfor _ in range(1000):\n{forks}print(os.getpid())").split()) == 1


def test_a_daemon_of_a_double_fork_is_never_born():
    code = (
        "import os, time\ntry:\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0: time.sleep(600)\n        os._exit(0)\nexcept OSError: print('refused')"
    )
    assert printed(code) == "refused\n"


def test_threads_are_counted():
    code = (
        "import threading\nthreading.stack_size(65536)\n"
        "while True:\n    try: threading.Thread(target=threading.Event().wait).start()\n    except RuntimeError: pass"
    )
    assert ran(code).ending == "threads"


def test_the_parent_and_others_get_no_signal():
    target = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert_refused(
        "os.kill(os.getppid(), signal.SIGKILL)",
        f"os.kill({target.pid}, signal.SIGKILL)",
        "os.killpg(0, signal.SIGKILL)",
        "os.kill(-1, signal.SIGKILL)",
        f"signal.pidfd_send_signal(os.pidfd_open({target.pid}), signal.SIGKILL)",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), [0])",
        "__import__('resource').prlimit(os.getppid(), 7, (1, 1))",
        # makes a descriptor send a signal to its owner whenever it can be read
        "__import__('fcntl').fcntl(0, 8, os.getppid())",
    )
    assert target.poll() is None
    target.communicate(b"\n")
    assert target.returncode == 0


def test_raw_system_calls_are_refused_too():
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for number in {[57, 41, 62, 317, 425] if os.uname().machine == 'x86_64' else [198, 129, 277, 425]}:\n"
        "    print(libc.syscall(number, 1, 1, 0), ctypes.get_errno())\n"
        "print(libc.prctl(22, 0, 0, 0, 0))"
    )
    assert set(printed(code).splitlines()) == {"-1 1", "-1"}


def test_a_sandbox_dies_with_the_process_that_started_it(tmp_path):
    code = (
        "import os, signal\nfrom experiments.tasks.code import sandbox\n"
        "def killed(process, limits, scratch):\n"
        "    print(process.pid, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "sandbox._watch = killed\nsandbox.run(sandbox.Request('while True: pass'), sandbox.Limits(seconds=600))"
    )
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    status = Path(f"/proc/{int(process.stdout)}/status")
    deadline = time.monotonic() + 30
    # A dead process that nobody waits for stays a zombie.
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- network ------------------------------------------------------------------------------------


def test_a_listening_socket_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        assert_refused(
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "socket.socket(socket.AF_INET6)",
            "socket.socket(socket.AF_UNIX)",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "socket.socketpair()",
        )
        with pytest.raises(BlockingIOError):
            server.accept()


# --- files --------------------------------------------------------------------------------------


def test_nothing_outside_the_scratch_folder_can_be_read(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("expected results")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    assert_refused(
        f"open({str(secret)!r}).read()",
        f"open('../../' + {secret.name!r}).read()",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "open('/proc/self/maps').read()",
        "open('/dev/tty').read()",
        "os.listdir('/')",
        "os.listdir('..')",
        f"os.listdir({str(ROOT)!r})",
        f"open({str(ROOT / 'pyproject.toml')!r}).read()",
        f"os.open({str(secret)!r}, 3)",
    )
    assert "hidden" not in printed("import os; print(dict(os.environ))")


def test_nothing_outside_the_scratch_folder_can_be_changed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    kept.chmod(0o644)
    path, new = str(kept), str(tmp_path / "new")
    before = kept.stat()
    assert_refused(
        f"open({path!r}, 'w')",
        f"open({path!r}, 'a')",
        f"open({path!r}, 'r+')",
        f"os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.open({path!r}, 3 | os.O_TRUNC)",
        f"os.truncate({path!r}, 0)",
        f"os.remove({path!r})",
        f"os.rename({path!r}, {new!r})",
        f"os.chmod({path!r}, 0o777)",
        f"os.chown({path!r}, 1, 1)",
        f"os.utime({path!r})",
        f"os.setxattr({path!r}, 'user.a', b'b')",
        f"open({new!r}, 'w')",
        "open('../new', 'w')",
        "open('/dev/shm/new', 'w')",
        f"os.mkdir({new!r})",
        f"os.mkfifo({new!r})",
        f"os.link({path!r}, 'link')",
        f"os.chdir({str(tmp_path)!r})",
        "os.chroot('.')",
    )
    assert kept.read_text() == "kept" and kept.stat().st_mtime_ns == before.st_mtime_ns
    assert kept.stat().st_mode == before.st_mode
    assert sorted(os.listdir(tmp_path)) == ["kept", "temporary"]


def test_no_link_leads_out_of_the_scratch_folder():
    assert_refused("os.symlink('/etc', 'link')", "os.symlink('/etc/passwd', 'link')", "os.link('/etc/passwd', 'link')")


def test_a_removed_or_nameless_file_cannot_hide_what_it_takes():
    assert_refused(
        "open('file', 'w').close() or os.remove('file')",
        "os.rename('file', 'other')",
        "os.mkdir('folder')",
        "os.open('.', os.O_TMPFILE | os.O_RDWR)",
        "os.memfd_create('memory')",
        "os.posix_fallocate(os.open('file', os.O_WRONLY), 0, 10**6)",
    )


@pytest.mark.parametrize(
    "code",
    [
        "open('large', 'wb').write(bytes(5 << 20))",
        "import os; os.truncate('/dev/null', 0)",
        "import os\ndescriptor = os.open('large', os.O_RDWR | os.O_CREAT)\nos.ftruncate(descriptor, 5 << 20)",
        "import os\nos.pwrite(1, b'x', 5 << 20)",
    ],
)
def test_no_file_grows_beyond_its_limit(code):
    assert ran(code).ending == "failed"


def test_many_files_fill_neither_the_disk_nor_the_folder():
    large = "import itertools\nfor number in itertools.count(): open(str(number), 'wb').write(bytes(1 << 20))"
    assert ran(large).ending == "disk"
    empty = "import itertools\nfor number in itertools.count(): open(str(number), 'w')"
    assert ran(empty).ending == "disk"


def test_open_files_are_counted():
    assert ran("files = [open('file', 'w') for _ in range(100)]").ending == "failed"


# --- output -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("print('x' * (2 << 20))", "output"),
        ("for _ in range(1 << 10): print('x' * (1 << 20))", "failed"),
        ("import os\nwhile True:\n    try: os.write(1, bytes(1 << 20))\n    except OSError: os._exit(0)", "output"),
        ("import sys\nfor _ in range(1 << 6): sys.stderr.write('x' * (1 << 20))\nprint('right')", "finished"),
    ],
)
def test_a_flood_of_output_is_cut(code, ending):
    outcome = ran(code)
    assert outcome.ending in (ending, "output")
    assert outcome.output == (b"right\n" if ending == "finished" else b"")


def test_a_huge_result_is_cut():
    assert ran("def f(): return 'x' * (2 << 20)", entry_point="f") == Outcome("output", b"")


def test_an_exit_without_a_result_gives_none():
    assert ran("import os; os._exit(0)", entry_point="f") == Outcome("finished", b"")
    assert ran("import os\ndef f(): os._exit(0)", entry_point="f") == Outcome("finished", b"")


def test_what_is_written_beside_the_result_spoils_it():
    code = (
        "import contextlib, os\ndef f():\n    for number in range(16):\n        with contextlib.suppress(OSError):\n"
        "            os.write(number, b'1 ')\n    return 1"
    )
    with pytest.raises(json.JSONDecodeError):
        json.loads(ran(code, entry_point="f").output)


# --- mistakes of the caller, and of the machine -------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.0}, "seconds is 0.0; set it to a finite number above 0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"memory_mib": 63}, "memory_mib is 63; set it to at least 64"),
        ({"output_mib": 0}, "output_mib is 0; set it to at least 1"),
        ({"disk_mib": 0}, "disk_mib is 0"),
        ({"files": 3}, "files is 3; set it to at least 16"),
        ({"threads": 0}, "threads is 0; set it to at least 1"),
        ({"output_mib": 17}, r"output_mib \(17\) is above disk_mib \(16\)"),
    ],
)
def test_limits_within_which_nothing_runs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Limits(**changes).check()


def test_the_smallest_limits_that_are_accepted_suffice():
    limits = Limits(seconds=60.0, memory_mib=64, output_mib=1, disk_mib=1, files=16, threads=1)
    limits.check()
    assert printed("import collections, re, typing\nprint(1)", limits) == "1\n"


def test_an_interpreter_that_dies_before_the_code_is_an_error_and_not_a_failed_test(monkeypatch):
    monkeypatch.setattr(sandbox, "_INSIDE", ROOT / "no such file")
    with pytest.raises(sandbox.SandboxError, match="ended 3 times before it could lock itself down"):
        ran("print(1)")


def test_a_step_that_fails_inside_is_an_error_and_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "_encoded_filter", lambda: bytes(8).hex())  # the kernel takes no such program
    with pytest.raises(sandbox.SandboxError, match="could not be closed at its step 'seccomp'"):
        ran("print(1)")
