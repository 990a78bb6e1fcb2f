"""A process that can open no network socket any more, nor can what it starts: a filter of its system calls (Linux seccomp, man 2 seccomp).

Needs no privilege, and works in containers that refuse new namespaces, such as Docker's by default.  Imports the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys

__all__ = ["leave_network"]

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2  # linux/prctl.h, linux/seccomp.h
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF, linux/filter.h: 32-bit load, jumps, return
CALL, ARCH, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, of a little-endian machine
AF_UNIX = 1
IO_URING_SETUP = 425  # on every architecture; an io_uring opens sockets past the filter
X32 = 0x40000000  # x86-64's second set of call numbers
MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""AUDIT_ARCH and the number of socket(2)."""


def leave_network() -> str:
    """From now on socket() fails with EACCES, but for AF_UNIX.  Cannot be undone.  Empty, or why it cannot be done here."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        return f"there is a filter for Linux on {' and '.join(MACHINES)} only, this is {sys.platform} on {machine}"
    instructions = _filter(*MACHINES[machine])
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
    # struct sock_fprog {unsigned short len; struct sock_filter *filter;}
    header = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(program)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(header)), 0, 0):
        return f"the kernel refuses a seccomp filter ({errno.errorcode.get(ctypes.get_errno(), ctypes.get_errno())})"
    return ""


def _filter(architecture: int, socket: int) -> list[tuple[int, int, int, int]]:
    """(operation, instructions to skip when true, when false, value); calls of another architecture are refused altogether."""
    return [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 0, 6, architecture),
        (LOAD, 0, 0, CALL),
        (AT_LEAST, 4, 0, X32),
        (EQUAL, 3, 0, IO_URING_SETUP),
        (EQUAL, 0, 3, socket),
        (LOAD, 0, 0, ARGUMENT),
        (EQUAL, 1, 0, AF_UNIX),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
