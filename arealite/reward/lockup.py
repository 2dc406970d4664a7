"""What a process gives up before it runs a program that nobody trusts: other processes, the network, files, its limits.

Called by sandbox_child.py in each forked process; needs nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(platform.machine(), 0)
# name: (number on x86_64, on aarch64); None: it has no such call.
CALLS = {
    "accept": (43, 202), "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217), "bind": (49, 200),
    "bpf": (321, 280), "capset": (126, 91), "chroot": (161, 51), "clone3": (435, 435), "connect": (42, 203),
    "delete_module": (176, 106), "execve": (59, 221), "execveat": (322, 281), "fanotify_init": (300, 262),
    "finit_module": (313, 273), "fork": (57, None), "fsconfig": (431, 431), "fsmount": (432, 432), "fsopen": (430, 430),
    "init_module": (175, 105), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425), "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104),
    "keyctl": (250, 219), "listen": (50, 201), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429), "mq_open": (240, 180),
    "msgget": (68, 186), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pivot_root": (155, 41), "process_madvise": (440, 440),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60),
    "reboot": (169, 142), "request_key": (249, 218), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "semget": (64, 190), "setdomainname": (171, 162), "sethostname": (170, 161), "setns": (308, 268),
    "setrlimit": (160, 164), "settimeofday": (164, 170), "shmget": (29, 194), "socket": (41, 198),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282), "vfork": (58, None), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "inotify_init1": (294, 26), "sched_setattr": (314, 274), "sched_setscheduler": (144, 119),
    "ioprio_set": (251, 30), "setpriority": (141, 140), "mlock": (149, 228), "mlock2": (325, 284),
    "mlockall": (151, 230), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Of files, what Landlock has no rule for (landlock(7), "Current limitations"): an owner's rights reach everywhere.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
}  # fmt: skip
CLONE, KILL, TKILL, TGKILL, PRLIMIT = (56, 220), (62, 129), (200, 130), (234, 131), (302, 261)
FCNTL, IOCTL, PRCTL, SOCKETPAIR = (72, 25), (16, 29), (157, 167), (53, 199)
# Commands that have the kernel send a signal to any process of the same user: F_SETOWN, F_SETSIG, F_SETOWN_EX, and
# FIOSETOWN, SIOCSPGRP. A program that outlives its supervisor: PR_SET_PDEATHSIG.
SIGNALLING = (8, 10, 15), (0x8901, 0x8902)
CLONE_THREAD, CLONE_NEW = 0x00010000, 0x7E020000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, SET, GREATER, RETURN = 0x20, 0x15, 0x45, 0x25, 0x06
ALLOW, KILL_PROCESS = 0x7FFF0000, 0x80000000
X32 = 0x40000000


def refuse(errno: int) -> int:
    return 0x00050000 | errno


def system_call_filter(pid: int) -> bytes:
    """A classic BPF program: no other process is started, signalled or looked into, nothing is executed, no socket
    opened, no limit raised. Signals to itself (`pid`) and threads are allowed."""
    column = 0 if platform.machine() == "x86_64" else 1
    lines: list[tuple[int, int, int, int]] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCH), (RETURN, 0, 0, KILL_PROCESS)]
    lines += [(LOAD, 0, 0, 0), (GREATER, 0, 1, X32 - 1), (RETURN, 0, 0, KILL_PROCESS)]

    def when(numbers: tuple[int | None, int | None], then: list[tuple[int, int, int, int]]) -> None:
        if numbers[column] is not None:
            lines.append((EQUAL, 0, len(then), numbers[column] or 0))
            lines.extend(then)

    for name, numbers in CALLS.items():
        when(numbers, [(RETURN, 0, 0, refuse(ENOSYS if name == "clone3" else EPERM))])
    low = 16  # offset of the first argument's low half
    threads = [
        (LOAD, 0, 0, low), (SET, 2, 0, CLONE_NEW), (SET, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, refuse(EPERM)),
    ]  # fmt: skip
    when(CLONE, threads)
    itself = [(LOAD, 0, 0, low), (EQUAL, 0, 1, pid), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, refuse(EPERM))]
    when(KILL, itself)
    when(TGKILL, itself)
    when(TKILL, [(RETURN, 0, 0, refuse(EPERM))])
    only_read = [  # prlimit64 with a pointer to new limits, in either half
        (LOAD, 0, 0, low + 16), (EQUAL, 0, 3, 0), (LOAD, 0, 0, low + 20), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, refuse(EPERM)),
    ]  # fmt: skip
    when(PRLIMIT, only_read)
    for call, offset, commands in (
        (FCNTL, 24, SIGNALLING[0]),
        (IOCTL, 24, SIGNALLING[1]),
        (PRCTL, 16, (PR_SET_PDEATHSIG,)),
    ):
        refused = [(EQUAL, len(commands) - place, 0, command) for place, command in enumerate(commands)]
        when(call, [(LOAD, 0, 0, offset), *refused, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, refuse(EPERM))])
    streams = [(LOAD, 0, 0, low + 8), (SET, 0, 1, 6), (RETURN, 0, 0, refuse(EPERM)), (RETURN, 0, 0, ALLOW)]
    when(SOCKETPAIR, streams)  # a pair of datagram sockets can send to any address
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def install_filter() -> None:
    program = system_call_filter(os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(header, len(header))
    checked(LIBC.prctl(PR_SET_SECCOMP, 2, pointer), "seccomp")


def checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what} failed")
    return result


READ, FOLDER, EXECUTE = 0b1100, 0b1000, 0b1  # Landlock's rights: to read (files and folders), and to execute
NUM_RIGHTS = {1: 13, 2: 14}  # by version; 15 from the third on


def install_landlock(readable: list[str], scratch: str) -> None:
    """Nothing can be read but `readable`, nothing changed outside `scratch` (Linux 5.13; see landlock(7))."""
    version = checked(LIBC.syscall(444, None, 0, 1), "landlock")
    every = (1 << NUM_RIGHTS.get(version, 15)) - 1
    rights = struct.pack("Q", every)
    ruleset = checked(LIBC.syscall(444, rights, len(rights), 0), "landlock_create_ruleset")
    for path, allowed in [*((path, READ) for path in readable), (scratch, every & ~EXECUTE)]:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed if os.path.isdir(path) else allowed & ~FOLDER, folder)
        checked(LIBC.syscall(445, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(folder)
    checked(LIBC.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def lock_up(order: dict[str, Any], kind: str, scratch: str) -> None:
    """What the process can still do when this returns is compute, think in its memory, and write into `scratch`."""
    os.setsid()
    os.umask(0o077)
    os.chdir(scratch)
    for name, value in (
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_CPU, int(order["limit_s"]) + 1),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, order["max_threads"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(name, (value, value))
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if order["uid"] is not None:
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user clears it
    checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    nothing = struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    checked(LIBC.capset(struct.pack("Ii", 0x20080522, 0), nothing), "capset")
    checked(LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    if kind == "landlock":
        install_landlock(order["readable"], scratch)
    install_filter()
