"""Every file of configs/ runs with --smoke, through training, checkpoints, evaluation and report.

The supervised ones in one process; of the on-policy ones, whose vLLM takes half a minute to start, srft.yaml (tests/trainer/test_onpolicy.py
trains with chord.yaml); `make test-smoke` has the other two as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plugin.config import load_config
from megatron_plugin.report.lines import read_metrics

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
ON_POLICY = [path for path in FILES if load_config(path).rollout is not None]
SUPERVISED = [path for path in FILES if path not in ON_POLICY]
STARTED = [path for path in ON_POLICY if path.stem == "srft" or os.environ.get("SMOKE_ALL")]
ALONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TRITON_INTERPRET")}


def start(folder: Path, *words: str) -> str:
    environment = ALONE | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def check(folder: Path, path: Path) -> None:
    run = folder / "runs" / f"{path.stem}-smoke"
    lines = read_metrics(run)
    assert lines[-1]["step"] == 2 and "train/loss" in lines[-1]
    assert "eval/heldout_nll" in lines[-1] and (run / "checkpoints/step_00000002").is_dir() and (run / "report.html").stat().st_size > 10_000
    saved = load_config(run / "config.yaml")
    assert saved.loss_name == load_config(path).loss_name


@pytest.mark.timeout(300)
def test_every_supervised_file(tmp_path):
    out = start(tmp_path, str(ROOT / "tests/cli/smoke_all.py"), *map(str, SUPERVISED))
    assert len(SUPERVISED) == 6 and out.count("\nsmoke: ") + out.startswith("smoke: ") == 6
    for path in SUPERVISED:
        check(tmp_path, path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", STARTED, ids=lambda path: path.name)
def test_on_policy(path, tmp_path, vllm):
    start(tmp_path, "-m", "megatron_plugin.cli", "train", str(path), "--smoke")
    check(tmp_path, path)


@pytest.mark.torchrun
@pytest.mark.timeout(300)
def test_the_multi_node_file_on_two_ranks(tmp_path):
    """Its layout as far as it goes: tensor and sequence parallel."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_plugin.cli", "train", str(ROOT / "configs/multi_node.yaml")]
    out = start(tmp_path, *words, "--smoke")
    assert out.count("smoke: run_dir=") == 1 and "parallel.tensor=2 " in out
    check(tmp_path, ROOT / "configs/multi_node.yaml")
