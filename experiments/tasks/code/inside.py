"""The program inside the sandbox: it locks itself down, reports how that went, and only then reads and runs the code.

A bare interpreter runs this script for every test, so it imports little of the standard library and nothing else. Its
one argument is JSON: descriptors, limits and the system call filter. It is never given an expected result.
"""

import _sitebuiltins
import builtins
import ctypes
import json
import marshal
import os
import resource
import struct
import sys
import types

_PR_SET_DEATH_SIGNAL, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVILEGES = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_SIGKILL = 9
_CAPABILITY_VERSION_3 = 0x20080522

# These numbers are the same on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION_QUERY, _LANDLOCK_RULE_PATH = 1, 1
_WRITE_FILE, _READ_FILE, _READ_FOLDER, _MAKE_FILE, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
# All rights of the first three versions; later ones concern devices and sockets, which cannot be reached from here.
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _SeccompProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(what: str, option: int, value: int, pointer: object = None) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)), what)


def _syscall(what: str, number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words), what)


def set_limits(limits: dict[str, int]) -> None:
    """Set hard limits, which nothing can raise once the capabilities are gone; stricter limits stay."""
    for name, value in limits.items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def drop_privileges(parent: int) -> None:
    """Give up all capabilities for good, and arrange to die with the parent process."""
    _prctl("prctl(PR_SET_PDEATHSIG)", _PR_SET_DEATH_SIGNAL, _SIGKILL)
    if os.getppid() != parent:
        raise OSError("The process that started the sandbox is gone.")
    _prctl("prctl(PR_SET_NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVILEGES, 1)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def confine_files(readable: list[str], scratch: str) -> None:
    """Allow, by Landlock, reads only below `readable`, and writes and new files only in `scratch` and /dev/null."""
    create = "landlock_create_ruleset"
    version = _syscall(create, _LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION_QUERY)
    handled = _ALL_RIGHTS[min(version, 3)]
    attributes = struct.pack("=Q", handled)
    ruleset = _syscall(create, _LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    write = _READ_FILE | _WRITE_FILE | (_TRUNCATE & handled)
    rules = [(path, _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0)) for path in readable]
    rules += [("/dev/null", write), (scratch, write | _READ_FOLDER | _MAKE_FILE)]
    for path, rights in rules:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, place)
        _syscall(f"landlock_add_rule({path})", _LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH, rule, 0)
        os.close(place)
    _syscall("landlock_restrict_self", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def confine_system_calls(instructions: bytes) -> None:
    """Install the seccomp filter, which holds until this process ends."""
    program = _SeccompProgram(len(instructions) // 8, instructions)
    _prctl("prctl(PR_SET_SECCOMP)", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def lock_down(settings: dict) -> dict[str, str]:
    """Take every step that succeeds, and return the reason for each that failed."""
    failed = {}
    steps = {
        "limits": lambda: set_limits(settings["limits"]),
        "privileges": lambda: drop_privileges(settings["parent"]),
        "landlock": lambda: confine_files(settings["readable"], os.getcwd()),
        "seccomp": lambda: confine_system_calls(bytes.fromhex(settings["filter"])),
    }
    for name, step in steps.items():
        try:
            step()
        except (OSError, ValueError) as error:
            failed[name] = str(error)
    return failed


def run_program(code: str, preamble: str) -> None:
    """Run the code as the main program, with the standard input and output of this process."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(preamble, module.__dict__)
    exec(compile(code, "response.py", "exec"), module.__dict__)


def call_function(code: str, preamble: str, entry_point: str, arguments: tuple) -> None:
    """Call the function, or the method of a new instance, and write its result alone, as JSON, to standard output."""
    output = os.dup(1)
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    module = types.ModuleType("response")
    sys.modules["response"] = module
    name, _, method = entry_point.partition(".")
    exec(preamble, module.__dict__)
    module.__dict__.pop(name, None)  # what the preamble defines is no answer
    exec(compile(code, "response.py", "exec"), module.__dict__)
    function = getattr(module, name)
    if method:
        function = getattr(function(), method)
    result = json.dumps(function(*arguments)).encode()
    while result:
        result = result[os.write(output, result) :]


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.argv = ["response.py"]
    failed = lock_down(settings)
    os.write(settings["report"], json.dumps(failed).encode())
    os.close(settings["report"])
    if set(failed) - set(settings["may_fail"]):
        sys.exit("The sandbox is not complete.")
    with open(settings["request"], "rb") as file:
        request = marshal.load(file)
    # Many programs end with exit(), which a bare interpreter lacks.
    builtins.exit, builtins.quit = _sitebuiltins.Quitter("exit", ""), _sitebuiltins.Quitter("quit", "")
    if request["entry_point"] is None:
        run_program(request["code"], request["preamble"])
    else:
        call_function(request["code"], request["preamble"], request["entry_point"], request["arguments"])


if __name__ == "__main__":
    main()
