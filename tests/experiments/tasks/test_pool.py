"""The pool of worker processes: order, limits, deaths, floods, interruptions, and nothing that outlives it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.tasks import pool as pool_module
from experiments.tasks.pool import Outcome, WorkerPool

ROOT = Path(__file__).parents[3]
LIMIT, WALL_LIMIT = 0.8, 1.2

FUNCTIONS = '''
import os, signal, subprocess, sys, time

def work(item):
    """Echo an item, or do what it names."""
    match item:
        case "pid": return os.getpid()
        case "parent": return os.getppid()
        case "sleep": time.sleep(60)
        case "loop":
            while True: pass
        case "power": return (9 ** 9 ** 9) % 7
        case "exit": os._exit(0)
        case "system exit": sys.exit(3)
        case "segfault": os.kill(os.getpid(), signal.SIGSEGV)
        case "memory": return len(bytearray(2 ** 40))
        case "raise": raise ValueError("a reason " + 10_000 * "x")
        case "no json": return {1, 2}
        case "flood": return 2 ** 21 * "x"
        case "modules": return sorted(sys.modules)
        case "print": print("imitation", flush=True); os.write(2, b"noise")
        case ["length", text]: return len(text)
        case ["pause", seconds, path]: open(path, "w").write(str(os.getpid())); time.sleep(seconds); return "paused"
        case ["power", path]: open(path, "w").write(str(os.getpid())); return (9 ** 9 ** 9) % 7
        case ["child", path]:
            child = subprocess.Popen(["sleep", "1000"])
            open(path, "w").write(str(child.pid))
            time.sleep(60)
    return item

def make(first, second):
    """Return a function that adds what was made before any worker was."""
    made = [first, second, os.getpid()]
    return lambda item: [*made, os.getppid(), item]
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Iterator[str]:
    """The name of a function in a module on `sys.path`, which the processes of a pool inherit."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "pool_functions.py").write_text(FUNCTIONS)
    (folder / "pool_broken.py").write_text("raise OSError('not today')")
    (folder / "pool_dead.py").write_text("import os\nos._exit(5)")
    sys.path.append(str(folder))
    yield "pool_functions:work"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def shared(functions) -> Iterator[WorkerPool]:
    with WorkerPool(functions, 2, LIMIT, memory_limit=2**32, wall_limit=WALL_LIMIT) as pool:
        yield pool


def is_alive(pid: int) -> bool:
    """Return whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_pid(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def values(outcomes: list[Outcome]) -> list[object]:
    assert all(outcome.failure == "" for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def test_values_come_in_the_order_of_the_items(shared):
    items = [*range(300), {"text": "ä\x00\ud800\n", "list": [None, 1.5]}]
    assert values(shared.map(items)) == items


def test_no_items_need_no_process(functions):
    pool = WorkerPool(functions, workers=2, time_limit=LIMIT)
    assert pool.map([]) == []
    assert pool.counts()["starts"] == 0


def test_no_more_processes_than_items_and_they_stay_for_the_next_call(functions):
    with WorkerPool(functions, workers=3, time_limit=30) as pool:
        first = values(pool.map(["pid"]))
        assert values(pool.map(["pid"])) == first
        assert pool.counts() == {"items": 2, "time limit": 0, "died": 0, "error": 0, "starts": 1}


@pytest.mark.parametrize(
    ("item", "failure", "detail"),
    [
        ("sleep", "time limit", "no answer within 1.2 s"),
        ("loop", "time limit", "no answer within"),
        ("power", "time limit", "no answer within"),
        ("exit", "died", "exit status 0"),
        ("system exit", "error", "SystemExit: 3"),
        ("segfault", "died", "signal SIGSEGV"),
        ("memory", "died", "out of memory"),
        ("flood", "died", "killed"),
        ("raise", "error", "ValueError: a reason x"),
        ("no json", "error", "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_a_failure_costs_its_own_item_only(shared, item, failure, detail):
    before = shared.counts()
    outcomes = shared.map([0, 1, 2, item, 4, 5, 6, 7])
    assert values(outcomes[:3] + outcomes[4:]) == [0, 1, 2, 4, 5, 6, 7]
    assert (outcomes[3].value, outcomes[3].failure) == (None, failure)
    assert outcomes[3].detail.startswith(detail)
    assert len(outcomes[3].detail) <= 500
    after = shared.counts()
    assert after.pop("starts") <= before.pop("starts") + 2
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "items": 8,
        failure: 1,
    }


def test_the_time_limit_counts_the_work_of_the_process_and_not_its_waiting(functions, tmp_path):
    with WorkerPool(functions, workers=1, time_limit=0.3, wall_limit=60) as pool:
        outcomes = pool.map(["loop", ["pause", 0.6, str(tmp_path / "pid")], "power"])
    out_of_time = Outcome(None, "time limit", "no answer within 0.3 s of CPU time")
    assert outcomes == [out_of_time, Outcome("paused"), out_of_time]


def test_a_function_that_is_made_once_before_the_workers(functions):
    with WorkerPool("pool_functions:make", 2, LIMIT, arguments=[1, "two"]) as pool:
        found = values(pool.map(["a", "b"]))
    assert [one[:2] + one[4:] for one in found] == [[1, "two", "a"], [1, "two", "b"]]
    assert {one[2] for one in found} == {one[3] for one in found}  # made in the server, the parent of both
    with (
        WorkerPool("pool_functions:make", 1, LIMIT, arguments=[1]) as pool,
        pytest.raises(RuntimeError, match=r"make\(\)"),
    ):
        pool.map(["a"])


def test_many_failures_in_a_row(shared):
    outcomes = shared.map(["exit", "loop", "segfault", "exit", "power", "raise", 6])
    assert [outcome.failure for outcome in outcomes] == [
        *("died", "time limit", "died", "died", "time limit", "error"),
        "",
    ]
    assert outcomes[6].value == 6


def test_what_an_item_started_dies_with_it(shared, tmp_path):
    (outcome,) = shared.map([["child", str(tmp_path / "pid")]])
    assert outcome.failure == "time limit"
    child = read_pid(tmp_path / "pid")
    wait_until(lambda: not is_alive(child))


def test_a_large_item_arrives_whole(shared):
    assert values(shared.map([["length", 5_000_000 * "x"], 1])) == [5_000_000, 1]


def test_an_idle_process_killed_from_outside_costs_no_item(functions):
    with WorkerPool(functions, workers=1, time_limit=30) as pool:
        (pid,) = values(pool.map(["pid"]))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
        assert values(pool.map([1, 2, 3])) == [1, 2, 3]
        assert pool.counts()["starts"] == 2


def test_a_busy_process_killed_from_outside_costs_its_item_only(functions, tmp_path):
    def kill() -> None:
        os.kill(read_pid(tmp_path / "pid"), signal.SIGKILL)

    with WorkerPool(functions, workers=1, time_limit=30) as pool:
        thread = threading.Thread(target=kill)
        thread.start()
        outcomes = pool.map([1, ["pause", 50, str(tmp_path / "pid")], 3])
        thread.join()
    assert outcomes == [Outcome(1), Outcome(None, "died", "killed"), Outcome(3)]


def test_a_server_killed_from_outside_is_replaced(functions, tmp_path):
    with WorkerPool(functions, workers=1, time_limit=30) as pool:
        (server,) = values(pool.map(["parent"]))
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: not is_alive(server))
        outcomes = pool.map([1, "exit", 3, 4])
        assert [outcome.failure for outcome in outcomes] == ["", "died", "", ""]
        assert values(pool.map(["parent"])) != [server]


def test_a_stopped_process_costs_its_time_limit_even_when_it_reads_nothing(functions):
    with WorkerPool(functions, workers=1, time_limit=LIMIT, wall_limit=LIMIT) as pool:
        (pid,) = values(pool.map(["pid"]))
        os.kill(pid, signal.SIGSTOP)
        outcomes = pool.map([["length", 5_000_000 * "x"], 2])
    assert [outcome.failure for outcome in outcomes] == ["time limit", ""]


def test_two_threads_share_a_pool(shared):
    found: dict[int, list[object]] = {}

    def call(first: int) -> None:
        found[first] = values(shared.map(range(first, first + 200)))

    threads = [threading.Thread(target=call, args=[first]) for first in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {first: [*range(first, first + 200)] for first in (0, 1000, 2000)}


def test_after_an_interruption_no_answer_is_taken_for_another(functions, tmp_path):
    def interrupt() -> None:
        read_pid(tmp_path / "pid")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with WorkerPool(functions, workers=2, time_limit=30) as pool:
        pool.map([1, 2])
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            pool.map([["pause", 50, str(tmp_path / "pid")], *range(3)])
        thread.join()
        wait_until(lambda: not is_alive(read_pid(tmp_path / "pid")))
        assert values(pool.map([7, 8, 9])) == [7, 8, 9]


def test_an_interruption_before_the_servers_reply_is_not_taken_for_another(functions, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with WorkerPool(functions, workers=2, time_limit=30) as pool:
        first = pool.map(["parent"])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pool_module._Server, "receive", interrupted)
            pool.map([1, 2, 3])
        assert values(pool.map([7, 8, 9])) == [7, 8, 9]
        assert pool.map(["parent"]) != first


def test_an_item_that_is_no_json_is_refused_and_disturbs_nothing(shared):
    with pytest.raises(TypeError, match="not JSON serializable"):
        shared.map([1, {2}, 3])
    assert values(shared.map([4, 5])) == [4, 5]


def test_processes_know_nothing_of_what_the_caller_imports(shared):
    ((*modules,),) = values(shared.map(["modules"]))
    assert "pool_functions" in modules
    assert {"jax", "numpy", "pytest"} <= set(sys.modules)
    assert not {"jax", "numpy", "pytest", "tensorflow", "rspo_jax", "__mp_main__"} & set(modules)


def test_what_an_item_prints_is_not_shown(shared, capfd):
    assert values(shared.map(["print"])) == ["print"]
    assert capfd.readouterr() == ("", "")


def test_a_closed_pool_has_no_processes_and_starts_anew(functions):
    pool = WorkerPool(functions, workers=2, time_limit=30)
    pids = values(pool.map(["pid"] * 20))
    pool.close()
    assert not any(is_alive(pid) for pid in pids)
    pool.close()
    assert values(pool.map([1])) == [1]
    pool.close()


@pytest.mark.parametrize("end", ["return", "raise KeyboardInterrupt", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_nothing_outlives_its_caller(functions, tmp_path, end):
    """One process is idle when the caller ends, and another is deep inside C code."""
    code = (
        "import os, sys, threading, time\n"
        f"sys.path.append({sys.path[-1]!r})\n"
        "from experiments.tasks.pool import WorkerPool\n"
        "path = sys.argv[1]\n"
        "def main():\n"
        "    idle, busy = (WorkerPool('pool_functions:work', 1, 0.3) for _ in range(2))\n"
        "    print(idle.map(['pid'])[0].value, flush=True)\n"
        "    threading.Thread(target=busy.map, args=[[['power', path]]], daemon=True).start()\n"
        "    while not (os.path.exists(path) and os.path.getsize(path)): time.sleep(0.01)\n"
        f"    {end}\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pid")]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    pids = [int(result.stdout), read_pid(tmp_path / "pid")]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_fork_of_the_caller_leaves_the_processes_alone(functions):
    code = (
        "import os, sys\n"
        f"sys.path.append({sys.path[-1]!r})\n"
        "from experiments.tasks.pool import WorkerPool\n"
        "pool = WorkerPool('pool_functions:work', 1, 30)\n"
        "first = pool.map(['pid'])\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "assert pool.map(['pid']) == first\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("pool_functions:missing", "cannot be imported(.|\n)*no attribute 'missing'"),
        ("pool_nowhere:work", "cannot be imported(.|\n)*No module named 'pool_nowhere'"),
        ("pool_broken:work", "cannot be imported(.|\n)*not today"),
        ("pool_dead:work", r"a process that imports pool_dead:work does not become ready \(exit status 5\)"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(functions, function, message):
    with WorkerPool(function, workers=1, time_limit=30) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                pool.map([1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "no_colon"}, "named like"),
        ({"function": "package.module:"}, "named like"),
        ({"function": "a b:c"}, "named like"),
        ({"workers": 0}, "workers=0"),
        ({"time_limit": 0.0}, "time_limit"),
        ({"time_limit": float("nan")}, "time_limit"),
        ({"time_limit": float("inf")}, "time_limit"),
        ({"time_limit": 2.0, "wall_limit": 1.0}, "wall_limit"),
        ({"memory_limit": 0}, "memory_limit"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    right = {"function": "module:name", "workers": 1, "time_limit": 1.0}
    with pytest.raises(ValueError, match=message), contextlib.closing(WorkerPool(**{**right, **arguments})):
        pass
