"""The system calls that sandboxed code may make, as a filter program for the kernel (seccomp).

Calls that are not in the table are refused: network, new processes, signals, tracing, mounts, changed permissions,
removed files. So calls of future kernels are refused as well. The numbers are those of the kernel's headers. This
module only builds the program; `inside.py` installs it.
"""

import platform
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MACHINES = ("x86_64", "aarch64")
_AUDIT_ARCHITECTURES = (0xC000003E, 0xC00000B7)

# name: (number on x86_64, number on aarch64, which lacks calls that newer ones replace)
ALLOWED: dict[str, tuple[int, int | None]] = {
    "access": (21, None),
    "alarm": (37, None),
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "epoll_wait": (232, None),
    "eventfd2": (290, 19),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fadvise64": (221, 223),
    "fstat": (5, 80),
    "ftruncate": (77, 46),
    "futex": (202, 98),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getgroups": (115, 158),
    "getitimer": (36, 102),
    "getpgid": (121, 155),
    "getpgrp": (111, None),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getresgid": (120, 150),
    "getresuid": (118, 148),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "getsid": (124, 156),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "pause": (34, None),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "preadv": (295, 69),
    "pselect6": (270, 72),
    "pwrite64": (18, 68),
    "pwritev": (296, 70),
    "read": (0, 63),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "readv": (19, 65),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigpending": (127, 136),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "select": (23, None),
    "sendfile": (40, 71),
    "set_robust_list": (273, 99),
    "setitimer": (38, 103),
    "setrlimit": (160, 164),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "time": (201, None),
    "times": (100, 153),
    "umask": (95, 166),
    "uname": (63, 160),
    "write": (1, 64),
    "writev": (20, 66),
}


class _Condition(NamedTuple):
    """A condition: the low 32 bits of an argument, masked, are among `values`, or, if not `among`, are none of them."""

    argument: int
    mask: int
    values: Sequence[int]
    among: bool = True


_ALL_BITS = 0xFFFFFFFF
_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020080
_ACCESS_MODE = 0o3
_TRUNCATE = 0o1000
_UNNAMED_FILE = 0o20000000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Not the owner of a descriptor's signals, which could be
# any process of the user, and no locks, whose number nothing bounds.
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 1030)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what Python asks of a file that may be a terminal.
_DEVICE_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)


def _opening(flags: int) -> tuple[_Condition, ...]:
    """Return the conditions on the flags of an open file, which are the argument at position `flags`.

    Landlock does not check access mode 3, nor, before its third version, truncation by a reader. A file without a
    name would escape the count of files in the scratch folder.
    """
    return (
        _Condition(flags, _ACCESS_MODE, [3], among=False),
        _Condition(flags, _ACCESS_MODE | _TRUNCATE, [_TRUNCATE], among=False),
        _Condition(flags, _UNNAMED_FILE, [0]),
    )


_CONDITIONAL: dict[str, tuple[tuple[int, int | None], tuple[_Condition, ...]]] = {
    "open": ((2, None), _opening(flags=1)),
    "openat": ((257, 56), _opening(flags=2)),
    "clone": ((56, 220), (_Condition(0, _CLONE_THREAD | _CLONE_NAMESPACES, [_CLONE_THREAD]),)),
    "fcntl": ((72, 25), (_Condition(1, _ALL_BITS, _DESCRIPTOR_COMMANDS),)),
    "ioctl": ((16, 29), (_Condition(1, _ALL_BITS, _DEVICE_COMMANDS),)),
    # Only limits of the process itself; otherwise those of another process, such as the trainer, could be lowered.
    "prlimit64": ((302, 261), (_Condition(0, _ALL_BITS, [0]),)),
}
# Its flags lie in memory, which a filter cannot read. This error makes the C library fall back to `clone`.
_CLONE3 = (435, 435)

_EPERM, _ENOSYS = 1, 38
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000
_KILL_PROCESS = 0x80000000

_LOAD, _AND, _JUMP, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16


def filter_program(machine: str | None = None) -> bytes:
    """Build the filter.

    Args:
        machine: "x86_64" or "aarch64". None: this machine.

    Returns:
        Classic BPF instructions of eight bytes each: `struct sock_filter`, little-endian.

    Raises:
        ValueError: if the table has no numbers for this machine.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in MACHINES:
        raise ValueError(f"The table of system calls has no column for {machine!r}; it has {', '.join(MACHINES)}.")
    column = MACHINES.index(machine)
    instructions = [
        _instruction(_LOAD, _ARCHITECTURE_OFFSET),
        _instruction(_JUMP_IF_EQUAL, _AUDIT_ARCHITECTURES[column], 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_OFFSET),
    ]
    for numbers in ALLOWED.values():
        instructions += _when_called(numbers[column], [_instruction(_RETURN, _ALLOW)])
    for numbers, conditions in _CONDITIONAL.values():
        instructions += _when_called(numbers[column], _allowed_if(conditions))
    instructions += _when_called(_CLONE3[column], [_instruction(_RETURN, _REFUSE | _ENOSYS)])
    return b"".join([*instructions, _instruction(_RETURN, _REFUSE | _EPERM)])


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, operand)


def _when_called(number: int | None, then: list[bytes]) -> Iterable[bytes]:
    """Return `then`, which must end in a return, behind a jump for every other call; nothing without such a call."""
    return [] if number is None else [_instruction(_JUMP_IF_EQUAL, number, 0, len(then)), *then]


def _allowed_if(conditions: Iterable[_Condition]) -> list[bytes]:
    """Return instructions that allow a call if all conditions hold, and refuse it otherwise."""
    instructions: list[bytes] = []
    for condition in conditions:
        refuse = _instruction(_RETURN, _REFUSE | _EPERM)
        instructions.append(_instruction(_LOAD, _ARGUMENTS_OFFSET + 8 * condition.argument))
        instructions.append(_instruction(_AND, condition.mask))
        # A test that succeeds jumps over the remaining tests and the one instruction after them.
        for left, value in zip(range(len(condition.values), 0, -1), condition.values, strict=True):
            instructions.append(_instruction(_JUMP_IF_EQUAL, value, left, 0))
        instructions += [refuse] if condition.among else [_instruction(_JUMP, 1), refuse]
    return [*instructions, _instruction(_RETURN, _ALLOW)]
