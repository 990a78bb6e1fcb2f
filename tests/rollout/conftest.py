"""What tests with a real vLLM share: they need one installed, one thread, and leave nothing behind."""

from pathlib import Path

import pytest

from megatron_plugin.rollout.vllm_versions import installed_vllm

SHARED = Path("/dev/shm")


def shared_files() -> set[str]:
    """Ours and vLLM's in shared memory."""
    return {p.name for p in SHARED.iterdir() if p.name.startswith(("megatron-plugin-", "psm_"))}


@pytest.fixture(scope="session")
def vllm():
    """Its version; tests that need it are skipped without one."""
    version = installed_vllm()
    if version is None:
        pytest.skip("no vLLM in this environment")
    return version
