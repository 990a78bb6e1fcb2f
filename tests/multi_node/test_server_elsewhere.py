"""docs/multi-node.md, rollouts from another host: the trainer on one, `megatron-plugin serve` on the other, weights over the cable between them."""

import json
import re
import sys
import time

import pytest

from megatron_plugin.data import generate
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.rollout.log import read_rollouts
from tests.multi_node.hosts import two_hosts, why_not
from tests.tolerances import ENGINE_LOGP

REASON = why_not()
pytestmark = [pytest.mark.torchrun, pytest.mark.skipif(bool(REASON), reason=REASON)]
PORT, MODULE = 8000, [sys.executable, "-m", "megatron_plugin.cli"]  # in its own namespace: nobody else has the port
SMALL = {
    "checkpoint.init": "", "data.bpe_vocab_size": 320, "data.expert_samples": 4, "rollout.prompts": 4, "rollout.n": 2, "rollout.max_tokens": 12, "train.micro_batch": 4,
    "train.warmup_steps": 0, "train.eval_interval": 0, "model.num_layers": 2, "train.lr": 3e-3, "train.steps": 2, "data.eval_answers": 0,
}  # fmt: skip


@pytest.mark.timeout(400)
def test_the_server_is_on_the_other_host(tmp_path):
    """Both are started at once: the trainer writes what the server is started from, and waits for it."""
    for split in ("train", "prompts", "eval"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate("train", 30, 5)))
    with two_hosts() as (here, there):
        url = f"http://{there.address}:{PORT}"
        rollout = {"rollout.engine": "server", "rollout.url": url, "rollout.transfer": "gloo", "rollout.bind": here.address}
        data = {f"data.{split}": tmp_path / f"{split}.jsonl" for split in ("train", "prompts", "eval")}
        values = SMALL | rollout | data | {"run_dir": tmp_path / "run"}
        trainer = here.start([*MODULE, "train", "configs/chord.yaml", *(f"{key}={value}" for key, value in values.items())])
        deadline = time.monotonic() + 120
        while not (engine := tmp_path / "run" / "engine" / "config.json").is_file():
            assert trainer.poll() is None and time.monotonic() < deadline, trainer.communicate(timeout=5)[0][-3000:]
            time.sleep(0.2)
        options = ["--host", there.address, "--public", "--port", str(PORT), "--transfer", "gloo", "--dtype", "fp32"]
        server = there.start([*MODULE, "serve", str(engine.parent), *options, "--log", str(tmp_path / "vllm.log")])
        while trainer.poll() is None:
            assert server.poll() is None, (tmp_path / "vllm.log").read_text()[-2000:] + server.communicate()[0][-2000:]
            time.sleep(0.5)
        output, _ = trainer.communicate()
        assert trainer.returncode == 0, output[-3000:] + (tmp_path / "vllm.log").read_text()[-2000:]
        assert server.poll() is None, "it serves the next job"
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and all(0 < line["rollout/logp_diff_max"] <= ENGINE_LOGP for line in lines)
    rollouts = list(read_rollouts(tmp_path / "run" / "rollouts.jsonl"))
    assert len(rollouts) == 2 * 4 * 2 and {line["weight_version"] for line in rollouts} == {0, 1}, "the weights of each step came over the cable"
    assert not re.search(r"127\.0\.0\.1:\d+", output), "nothing that mattered was on loopback"
