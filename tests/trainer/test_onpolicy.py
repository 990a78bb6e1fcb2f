"""On-policy training as a person starts it: torchrun, tensor and pipeline parallel, a real vLLM that gets new weights at every step."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from megatron_plugin.data import generate
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.rollout.log import read_rollouts
from tests.tolerances import ENGINE_LOGP

ROOT = Path(__file__).parent.parent.parent
PROMPTS, N = 4, 4


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("problems")
    for split, count in (("expert", 60), ("prompts", 60), ("heldout", 6)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate(split, count, 5)))
    return {split: folder / f"{split}.jsonl" for split in ("expert", "prompts", "heldout")}


def start(problems, run_dir: Path, ranks: int, **overrides) -> subprocess.Popen:
    values = {
        "run_dir": run_dir, "checkpoint.init": "", "data.train": problems["expert"], "data.prompts": problems["prompts"], "data.eval": problems["heldout"],
        "data.bpe_vocab_size": 320, "data.expert_samples": 4, "rollout.prompts": PROMPTS, "rollout.n": N, "rollout.max_tokens": 24, "train.micro_batch": 4,
        "train.warmup_steps": 0, "train.eval_interval": 0, "model.num_layers": 2, "train.lr": 3e-3,  # heads of 32: vLLM's attention on a CPU has none of 16, and dies at the first prompt
    } | overrides  # fmt: skip
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "megatron_plugin.cli", "train",
             "configs/chord.yaml", *(f"{key}={value}" for key, value in values.items())]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(job: subprocess.Popen, timeout: float = 240) -> str:
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGTERM)
        pytest.fail(f"the job did not end within {timeout} s: {job.communicate()[0][-3000:]}")
    return output


def engines_of(run_dir: Path) -> dict[int, str]:
    """Process id -> address of the vLLM servers of a run."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"vllm.entrypoints.openai.api_server" in words and str(run_dir / "engine").encode() in words:
                found[int(entry.name)] = f"http://127.0.0.1:{words[words.index(b'--port') + 1].decode()}"
    return found


def is_generating(address: str) -> bool:
    try:
        lines = httpx.get(f"{address}/metrics", timeout=2).text.splitlines()
    except httpx.HTTPError:
        return False
    return any(line.startswith("vllm:num_requests_running{") and float(line.split()[-1]) > 0 for line in lines)


@pytest.mark.torchrun
@pytest.mark.timeout(600)
def test_every_sampled_token_has_the_trainers_log_probability(problems, tmp_path):
    """TP2 x PP2 in fp32, CHORD-phi, after each weight update; then resumed for one more step."""
    layout = {"parallel.tensor": 2, "parallel.pipeline": 2}
    output = finish(start(problems, tmp_path / "run", 4, **layout, **{"train.steps": 2}))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2], output[-3000:]
    for line in lines:
        assert 0 < line["rollout/logp_diff_max"] <= ENGINE_LOGP  # 0 would mean that nothing was compared
        assert line["train/mu"] == 0.1 and line["train/expert_tokens"] > 0 and line["train/rollout_tokens"] > 0 and line["rollout/staleness"] == 0
    rollouts = list(read_rollouts(tmp_path / "run" / "rollouts.jsonl"))
    assert len(rollouts) == 2 * PROMPTS * N and sorted({r["weight_version"] for r in rollouts}) == [0, 1]
    assert sum(r["tokens"] for r in rollouts) == sum(line["train/rollout_tokens"] for line in lines)
    assert lines[-1]["eval/heldout_reward_greedy"] is not None and not engines_of(tmp_path / "run")

    finish(start(problems, tmp_path / "run", 2, **{"parallel.tensor": 2, "train.steps": 3, "train.lr_decay": "constant"}))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    again = list(read_rollouts(tmp_path / "run" / "rollouts.jsonl"))
    assert again[: len(rollouts)] == rollouts and len(again) == 3 * PROMPTS * N
    assert not {r["source"] for r in again[len(rollouts) :]} & {r["source"] for r in rollouts}, "60 prompts, 12 asked: none comes twice"


@pytest.mark.torchrun
@pytest.mark.timeout(600)
def test_an_engine_killed_in_the_middle_of_a_step(problems, tmp_path):
    """It is restarted and sent the weights; every prompt of every step has its completions once, each of one version."""
    job = start(problems, tmp_path / "run", 2, **{"parallel.tensor": 2, "train.steps": 4, "rollout.max_tokens": 90, "rollout.n": 16})
    deadline = time.monotonic() + 200
    while not read_metrics(tmp_path / "run") and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    victims = engines_of(tmp_path / "run")
    assert victims, finish(job)[-3000:]
    while not any(map(is_generating, victims.values())):
        assert time.monotonic() < deadline and job.poll() is None, "the second step's completions were never seen in flight"
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    output = finish(job)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4], output[-3000:]
    assert sum(line["rollout/lost_engines"] for line in lines) == 1
    rollouts = list(read_rollouts(tmp_path / "run" / "rollouts.jsonl"))
    assert set(Counter((r["step"], r["source"]) for r in rollouts).values()) == {16} and len(rollouts) == 4 * PROMPTS * 16
    for step in range(1, 5):
        assert len({r["weight_version"] for r in rollouts if r["step"] == step}) <= 2  # those before the loss, and those after it
    assert all(line["rollout/logp_diff_max"] <= ENGINE_LOGP for line in lines), "no completion is of other weights than the trainer's"
