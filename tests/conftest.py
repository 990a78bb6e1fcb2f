"""One process-wide choice: compiled Triton kernels on a GPU, the interpreter without one.  Set before any kernel is decorated."""

import os
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.triton_interpreter import install

    install()

import pytest

warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def vllm():
    """Its version; tests that need it are skipped without one."""
    from megatron_plugin.rollout.vllm_versions import installed_vllm

    version = installed_vllm()
    if version is None:
        pytest.skip("no vLLM in this environment")
    return version


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260822)


def _unlisted_skips(reporter) -> list[str]:
    listed = [line.split("#")[0].strip() for line in (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()]
    prefixes = tuple(line for line in listed if line)
    return sorted({r.nodeid for r in reporter.stats.get("skipped", []) if not r.nodeid.startswith(prefixes)})


def pytest_sessionfinish(session, exitstatus):
    """A skip that is not in allowed_skips.txt fails the run: a test that stopped running must not go unnoticed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter and (unlisted := _unlisted_skips(reporter)):
        session.exitstatus = 1
        reporter.write_line("\nskipped, and not listed in tests/allowed_skips.txt: " + ", ".join(unlisted), red=True)
