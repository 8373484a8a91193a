"""The system call filter: an interpreter of BPF runs it as the kernel would, for the calls of both architectures."""

import errno
import struct

import pytest

from experiments.tasks.code.system_calls import filter_program

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
THREAD = 0x3D0F00  # the flags that the C library passes to clone for a thread
SIGCHLD = 17


def decision(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """Return the kernel's decision on a call: run the classic BPF program over `struct seccomp_data`."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    architecture = ARCHITECTURES[machine] if architecture is None else architecture
    data = struct.pack("<IIQ6Q", number, architecture, 0, *padded)
    program = list(struct.iter_unpack("<HBBI", filter_program(machine)))
    accumulator, place = 0, 0
    while True:
        code, if_true, if_false, operand = program[place]
        place += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, operand)[0]
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            place += operand
        elif code == 0x15:
            place += if_true if accumulator == operand else if_false
        else:
            assert code == 0x06
            return operand


# Numbers from the kernel's tables: (x86_64, aarch64); None where an architecture has no such call.
PLAIN = {
    "read": (0, 63),
    "write": (1, 64),
    "mmap": (9, 222),
    "futex": (202, 98),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
    "newfstatat": (262, 79),
    "rt_sigreturn": (15, 139),
}
FORBIDDEN = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "sendto": (44, 206),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "mount": (165, 40),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "userfaultfd": (323, 282),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "openat2": (437, 437),
    "unlinkat": (263, 35),
    "mkdirat": (258, 34),
    "symlinkat": (266, 36),
    "linkat": (265, 37),
    "renameat2": (316, 276),
    "fchmodat": (268, 53),
    "fchownat": (260, 54),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "chdir": (80, 49),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "setuid": (105, 146),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "landlock_restrict_self": (446, 446),
    "a call of the future": (9999, 9999),
}


def numbers(table):
    return [
        pytest.param(machine, number, id=f"{name}-{machine}")
        for name, row in table.items()
        for machine, number in zip(ARCHITECTURES, row, strict=True)
        if number is not None
    ]


@pytest.mark.parametrize(("machine", "number"), numbers(PLAIN))
def test_what_an_interpreter_needs_is_allowed(machine, number):
    assert decision(machine, number) == ALLOW


@pytest.mark.parametrize(("machine", "number"), numbers(FORBIDDEN))
def test_what_leads_out_of_the_sandbox_is_refused(machine, number):
    assert decision(machine, number) == REFUSE
    assert decision(machine, number, THREAD, 2, 3) == REFUSE


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls_of_another_architecture_end_the_process(machine):
    other = next(value for name, value in ARCHITECTURES.items() if name != machine)
    for architecture in (other, 0x40000003):  # the second is 32-bit x86, which a 64-bit process can enter
        assert decision(machine, 1, architecture=architecture) == KILL


def test_calls_with_32_bit_pointers_are_refused():
    x32 = 0x40000000
    assert decision("x86_64", x32 | 1) == REFUSE


@pytest.mark.parametrize(("machine", "number"), numbers({"clone": (56, 220)}))
def test_threads_are_allowed_and_processes_are_not(machine, number):
    assert decision(machine, number, THREAD) == ALLOW
    assert decision(machine, number, SIGCHLD) == REFUSE
    assert decision(machine, number, 0x4111) == REFUSE  # CLONE_VM | CLONE_VFORK | SIGCHLD
    for namespace in (0x00020000, 0x10000000, 0x20000000, 0x40000000, 0x80):
        assert decision(machine, number, THREAD | namespace) == REFUSE


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_clone3_is_said_to_be_absent_so_that_clone_is_taken(machine):
    assert decision(machine, 435) == 0x00050000 | errno.ENOSYS


@pytest.mark.parametrize(
    ("machine", "number", "before"), [("x86_64", 2, (0,)), ("x86_64", 257, (0, 0)), ("aarch64", 56, (0, 0))]
)
def test_files_are_opened_in_ways_that_landlock_sees(machine, number, before):
    read, write, read_write, create, truncate = 0, 1, 2, 0o100, 0o1000
    for flags in (read, write, read_write, write | create | truncate, read_write | truncate):
        assert decision(machine, number, *before, flags) == ALLOW
    for flags in (3, 3 | truncate, read | truncate, read_write | 0o20000000):
        assert decision(machine, number, *before, flags) == REFUSE


@pytest.mark.parametrize(("machine", "number"), numbers({"prlimit64": (302, 261)}))
def test_only_the_limits_of_the_process_itself_can_be_set(machine, number):
    assert decision(machine, number, 0, 7) == ALLOW
    assert decision(machine, number, 1, 7) == REFUSE
    assert decision(machine, number, 2**32 - 1, 7) == REFUSE


@pytest.mark.parametrize(("machine", "number"), numbers({"fcntl": (72, 25)}))
def test_descriptors_cannot_be_made_to_send_signals(machine, number):
    for command in (0, 1, 2, 3, 4, 1030):
        assert decision(machine, number, 5, command) == ALLOW
    for command in (5, 6, 7, 8, 10, 15, 1031, 1033):  # locks, F_SETOWN, F_SETSIG, F_SETOWN_EX, pipe size, seals
        assert decision(machine, number, 5, command) == REFUSE


@pytest.mark.parametrize(("machine", "number"), numbers({"ioctl": (16, 29)}))
def test_devices_are_asked_no_more_than_whether_they_are_terminals(machine, number):
    assert decision(machine, number, 1, 0x5401) == ALLOW
    assert decision(machine, number, 1, 0x5451) == ALLOW
    assert decision(machine, number, 0, 0x5412) == REFUSE  # TIOCSTI: types into the terminal


def test_a_machine_without_a_table_is_refused():
    with pytest.raises(ValueError, match=r"no column for 'ppc64le'; it has x86_64, aarch64"):
        filter_program("ppc64le")
