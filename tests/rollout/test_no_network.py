"""The filter that takes the network from a process: each system call it decides about, and what Linux then says."""

import itertools
import os
import platform
import socket
import subprocess
import sys

import pytest

from megatron_plugin.rollout import no_network
from megatron_plugin.rollout.no_network import (
    AF_UNIX,
    ALLOW,
    ARCH,
    ARGUMENT,
    AT_LEAST,
    CALL,
    EQUAL,
    IO_URING_SETUP,
    LOAD,
    MACHINES,
    REFUSE,
    X32,
    leave_network,
)

FAMILIES = {"unix": AF_UNIX, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "bluetooth": 31, "vsock": 40}


def decided(architecture: int, call: int, argument: int, *, of: str) -> bool:
    """Whether the filter of machine `of` allows a call: classic BPF, run by hand."""
    at, value, program = 0, 0, no_network._filter(*MACHINES[of])
    while True:
        operation, true, false, constant = program[at]
        at += 1
        if operation == LOAD:
            value = {ARCH: architecture, CALL: call, ARGUMENT: argument}[constant]
        elif operation in (EQUAL, AT_LEAST):
            at += true if (value == constant if operation == EQUAL else value >= constant) else false
        else:
            assert constant in (ALLOW, REFUSE)
            return constant == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_only_network_sockets_are_refused(machine):
    architecture, number = MACHINES[machine]
    for call, argument in itertools.product(range(460), FAMILIES.values()):
        expected = call != IO_URING_SETUP and (call != number or argument == AF_UNIX)
        assert decided(architecture, call, argument, of=machine) is expected, (call, argument)
    assert not decided(architecture, X32 | number, AF_UNIX, of=machine), "x86-64's other numbers of the same calls"
    assert not decided(0x40000003, 359, 2, of=machine), "32-bit programs have numbers of their own"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in MACHINES, reason="no such filter")
def test_linux_refuses_and_children_cannot_undo_it():
    child = "import socket\nfor family in (2, 10, 16):\n  try: socket.socket(family, 3 if family == 16 else 1)\n  except PermissionError: print('refused')"
    script = (
        "import socket, subprocess, sys\nfrom megatron_plugin.rollout.no_network import leave_network\nassert leave_network() == ''\n"
        f"socket.socket(socket.AF_UNIX).close(); socket.socketpair()[0].close()\n{child}\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)\n"
    )
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=60)
    assert done.stdout == "refused\n" * 6 and done.returncode == 0, done
    socket.socket(socket.AF_INET).close()  # of this process nothing was taken


def test_another_machine_says_why_not(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "Linux on x86_64 and aarch64 only, this is linux on riscv64" in leave_network()
