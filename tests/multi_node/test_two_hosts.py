"""docs/multi-node.md, on two hosts that only a network joins."""

import subprocess
import sys

import pytest

from megatron_plugin.report.lines import read_metrics
from tests.multi_node.hosts import ROOT, two_hosts, why_not

REASON = why_not()
pytestmark = [pytest.mark.torchrun, pytest.mark.skipif(bool(REASON), reason=REASON)]
STEPS = 4
SMALL = ["parallel.tensor=2", f"train.steps={STEPS}", "train.eval_interval=0", "data.eval_answers=0", "checkpoint.interval=2"]


def torchrun(*options: str, run_dir, more=()) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "megatron_plugin.cli", "train", "configs/debug_cpu.yaml", f"run_dir={run_dir}", *SMALL, *more]


def nodes(hosts, port: int, **kwargs) -> list[subprocess.Popen]:
    endpoint = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:{port}", "--rdzv-id=7"]
    return [
        host.start(torchrun(*endpoint, f"--rdzv-conf=is_host={int(host is hosts[0])}", f"--local-addr={host.address}", **kwargs)) for host in hosts
    ]


def finished(jobs: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    outputs = [job.communicate(timeout=timeout)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(outputs)[-4000:]
    return outputs


def test_two_nodes_train_as_one_does_and_resume(tmp_path):
    """Tensor parallel across the network, a checkpoint by both, and the same command again."""
    alone = subprocess.run(torchrun("--standalone", "--nproc-per-node=2", run_dir=tmp_path / "one"), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0, alone.stdout[-3000:] + alone.stderr[-3000:]
    with two_hosts() as hosts:
        outputs = finished(nodes(hosts, 29_611, run_dir=tmp_path / "two"))
        assert sum(f"step {STEPS}/{STEPS}" in output for output in outputs) == 1, "one rank of the job speaks"
        resumed = finished(nodes(hosts, 29_612, run_dir=tmp_path / "two", more=[f"train.steps={STEPS + 2}"]))
        assert any(f"step {STEPS + 2}/{STEPS + 2}" in output for output in resumed)
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == list(range(1, STEPS + 3))
    for name in ("train/loss", "train/grad_norm"):
        assert [line[name] for line in two[:STEPS]] == [line[name] for line in one], f"{name}: two hosts, and two ranks of one"


def test_a_node_that_dies_ends_the_other(tmp_path):
    """Nobody waits for ever for a host that is gone."""
    with two_hosts() as hosts:
        jobs = nodes(hosts, 29_613, run_dir=tmp_path / "two", more=["train.steps=100000", "train.timeout_s=20"])
        for line in jobs[0].stdout:
            if "step " in line and "/100000" in line:
                break
        else:
            pytest.fail("the job ended before its first step")
        hosts[1].kill()
        output, _ = jobs[0].communicate(timeout=120)
    assert jobs[0].returncode != 0, output[-3000:]
