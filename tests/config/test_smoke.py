"""--smoke: what it changes, what it leaves, and what it may remove.  (tests/cli/test_smoke_runs.py runs every file with it.)"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_plugin.config import ConfigError, load_config, to_yaml
from megatron_plugin.config.smoke import SMOKE, fresh_run_dir, smoke_line

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
LARGE = """\
run_dir: /shared/runs/big
train: {steps: 5000, micro_batch: 3, global_batch: 384, warmup_steps: 100, eval_interval: 100, dtype: bf16}
parallel: {tensor: 8, pipeline: 4, virtual: 2, context: 2, sequence: true, distributed_optimizer: true}
loss: {name: idft}
data: {train: [/shared/a.jsonl], eval: [/shared/b.jsonl], tokenizer: /shared/t, seq_length: 32768, eval_samples: 0, eval_answers: 100}
model: {num_layers: 64, hidden_size: 8192, ffn_hidden_size: 28672, num_attention_heads: 64, num_query_groups: 8, kv_channels: 128, fp8: hybrid,
        recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 4, num_layers_in_first_pipeline_stage: 8, layernorm_epsilon: 1.0e-6}
checkpoint: {init: /shared/model, resume: never, interval: 50, asynchronous: true}
log: {wandb: team/project}
profile: {first_step: 10, ranks: [0, 8]}
"""


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_plugin.config.log_checks._installed", lambda module: True)
    path = tmp_path / "large.yaml"
    path.write_text(LARGE)
    return path


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 64])
def test_any_layout_is_cut_to_the_ranks_there_are(large, world_size):
    config = load_config(large, world_size=world_size, smoke=True)
    parallel = config.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    assert world_size % model_ranks == 0 and (parallel.tensor, parallel.pipeline, parallel.context) == {
        1: (1, 1, 1), 2: (2, 1, 1), 4: (4, 1, 1), 8: (8, 1, 1), 64: (8, 4, 2)}[world_size]  # fmt: skip
    assert parallel.sequence == (world_size > 1) and parallel.virtual == (2 if world_size == 64 else 1)
    assert parallel.distributed_optimizer and config.checkpoint.asynchronous and config.train.dtype == "bf16", "what runs on a CPU stays"


def test_what_a_large_file_becomes(large):
    config = load_config(large, world_size=1, smoke=True)
    assert (config.train.steps, config.train.micro_batch, config.train.global_batch, config.train.warmup_steps, config.train.eval_interval) == (2, 2, 4, 1, 2)
    assert config.data.train == config.data.eval == [] and config.data.tokenizer == "" and config.data.seq_length == 128
    assert (config.data.eval_samples, config.data.eval_answers) == (4, 2)
    assert (config.checkpoint.init, config.checkpoint.resume, config.checkpoint.interval) == ("", "auto", 1)
    model = config.model
    assert (model["num_layers"], model["hidden_size"], model["num_attention_heads"], model["num_query_groups"], model["kv_channels"]) == (2, 64, 2, 1, 32)
    assert model["fp8"] is None and model["recompute_granularity"] is None and model["layernorm_epsilon"] == 1e-6
    assert (config.run_dir, config.loss_name, config.log.wandb) == ("/shared/runs/big-smoke", "idft", "")
    assert (config.profile.first_step, config.profile.ranks) == (1, [0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_hidden(path):
    """The printed line, as overrides of the file, makes the same configuration; each value's origin says --smoke."""
    config = load_config(path, smoke=True, world_size=1)
    line = smoke_line(config)
    assert "\n" not in line and line.startswith(f"smoke: run_dir=runs/{path.stem}-smoke ")
    assert load_config(path, line.removeprefix("smoke: ").split(" "), world_size=1) == config
    changed = [key for key, origin in config.sources.items() if origin == SMOKE]
    assert len(changed) == line.count("=") and to_yaml(config).count(f"# {SMOKE}\n") == len(changed)
    assert not any(load_config(path).sources.get(key) == SMOKE for key in changed)


def test_an_override_goes_over_it(large, tmp_path):
    data = tmp_path / "x.jsonl"
    data.touch()
    words = ["train.steps=5", "train.micro_batch=1", "model.num_layers=4", f"data.train={data}", "run_dir=mine", "tensor_model_parallel_size=2"]
    config = load_config(large, words, world_size=2, smoke=True)
    assert (config.train.steps, config.train.micro_batch, config.model["num_layers"], config.parallel.tensor) == (5, 1, 4, 2)
    assert config.run_dir == "mine" and config.data.train == [str(data)] and config.data.overlong == "truncate"
    assert config.train.warmup_steps == 4 and config.train.global_batch == 2, "what goes with it follows"


def test_on_policy_needs_no_server_and_no_second_rank():
    overrides = ["rollout.updates=8", "rollout.n=4"]
    config = load_config(CONFIGS / "chord.yaml", overrides, world_size=2, smoke=True)
    assert (config.rollout.updates, config.rollout.n, config.rollout.prompts, config.train.steps) == (8, 4, 32, 16), "both given"
    config = load_config(CONFIGS / "grpo.yaml", ["recipe=dapo"], world_size=2, smoke=True)
    assert (config.rollout.n, config.rollout.prompts, config.rollout.max_tokens, config.rollout.dynamic_sampling) == (2, 4, 16, 1)
    assert config.checkpoint.init == "" and config.data.expert_samples == 2 and config.model["hidden_size"] // config.model["num_attention_heads"] == 32


def test_a_server_of_the_cluster_is_not_asked(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text((CONFIGS / "grpo.yaml").read_text().replace("engine: vllm ", "engine: server\n  url: [http://10.0.0.7:8000]\n  transfer: nccl "))
    config = load_config(path, smoke=True)
    assert (config.rollout.engine, config.rollout.url, config.rollout.transfer) == ("vllm", [], "auto")


def test_a_file_that_cannot_be_trained_is_refused_as_it_is(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text((CONFIGS / "sft.yaml").read_text().replace("global_batch: 16", "global_batch: 15"))
    with pytest.raises(ConfigError, match="train.global_batch: got 15, expected a multiple of 4"):
        load_config(path, smoke=True)


def test_machines_that_share_the_file_system_clear_it_at_once(tmp_path, monkeypatch):
    """Each begins with what the last run left, or with what another has just made."""
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS / "sft.yaml", smoke=True)
    folder = Path(config.run_dir)
    with ThreadPoolExecutor(4) as machines:
        for _ in range(25):
            fresh_run_dir(config)
            for part in range(20):
                (folder / str(part)).touch()
            together = threading.Barrier(4)
            list(machines.map(lambda _, together=together: (together.wait(), fresh_run_dir(config)), range(4)))
            assert [path.name for path in folder.iterdir()] == [".smoke"] and list(folder.parent.iterdir()) == [folder]


def test_only_what_a_smoke_run_made_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS / "sft.yaml", smoke=True)
    folder = Path(config.run_dir)
    fresh_run_dir(config)
    (folder / "checkpoints").mkdir()
    fresh_run_dir(config)
    assert [path.name for path in folder.iterdir()] == [".smoke"]
    (folder / ".smoke").rename(folder / "precious")
    with pytest.raises(ConfigError, match="runs/sft-smoke: got what no smoke run made"):
        fresh_run_dir(config)
    assert (folder / "precious").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".smoke").touch()
    (elsewhere / "precious").touch()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(ConfigError):
        fresh_run_dir(config)
    named = load_config(CONFIGS / "sft.yaml", [f"run_dir={elsewhere}"], smoke=True)
    fresh_run_dir(named)
    assert (elsewhere / "precious").exists(), "a directory that the person names is left alone"
