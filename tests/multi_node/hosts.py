"""Two hosts on one machine: network namespaces joined by a cable of their own.  Files and processor are shared, the network is not.

    with two_hosts() as hosts:
        job = hosts[0].start(["torchrun", ...])        # in that namespace; hosts[0].address is what the other one reaches it by
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Host:
    name: str
    interface: str
    address: str
    jobs: list[subprocess.Popen] = field(default_factory=list)

    def start(self, words: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen:
        """A process of this host, in a process group of its own; ended with the hosts at the latest."""
        variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": self.interface} | (environment or {})
        job = subprocess.Popen(["ip", "netns", "exec", self.name, *words], cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)  # fmt: skip
        self.jobs.append(job)
        return job

    def kill(self) -> None:
        """What a power cut does: every process of this host is gone, torchrun's ranks too, which are in sessions of their own."""
        for pid in subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for job in self.jobs:
            job.wait()


def why_not() -> str:
    """Why this machine cannot play two hosts; "" if it can."""
    if os.geteuid() or shutil.which("ip") is None:
        return "network namespaces need root and the command ip"
    made = subprocess.run(["ip", "netns", "add", name := f"try{os.getpid()}"], capture_output=True, text=True)
    if made.returncode:
        return f"this machine allows no network namespace: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Everything that was started in them is killed in the end, and the namespaces are gone."""
    number = os.getpid() % 10_000  # interface names are at most 15 characters
    hosts = tuple(Host(f"mp{number}h{i}", f"mp{number}v{i}", f"10.99.{number % 250}.{i}") for i in (1, 2))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", hosts[0].interface, "type", "veth", "peer", "name", hosts[1].interface)
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
