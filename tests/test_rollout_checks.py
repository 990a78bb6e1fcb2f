"""The section `rollout`: what cannot work is refused before torch is imported, with the key, its origin and what would work."""

import re

import pytest

from megatron_plugin.config import ConfigError, load_config
from megatron_plugin.config.rollout_checks import check_rollout_world

SMALL = """\
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
data: {seq_length: 128}
loss: {name: grpo}
rollout: {prompts: 24, n: 8, max_tokens: 64}
"""
SERVER = "rollout.engine=server"
STALE = "rollout.max_staleness=1"


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refused(path, *overrides) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2 and caught.value.reason.startswith("got ") and "expected " in caught.value.reason
    return caught.value


REFUSED = [  # overrides -> key, parts of the message
    (["mu.peak=0.5"], "mu", "got a schedule, expected none: loss grpo has no share of expert data; leave it out, or use loss.name=chord"),
    (["mu.peak=0.5", "loss.name=srft"], "mu", "loss srft has no share"),
    (["loss.name=srft", "data.prompts=p.jsonl"], "data.prompts", "got files, expected none with loss srft: .*demonstrations in data.train"),
    (["loss.name=gspo", "parallel.context=2"], "parallel.context", "got 2, expected 1 with loss gspo: .*whole sequences"),
    (["rollout.n=1"], "rollout.n", "got 1, expected at least 2: .*or set rollout.advantage_scale=none or batch"),
    ([SERVER], "rollout.url", "got nothing, expected the addresses of running servers"),
    (["rollout.url=[http://a:1,http://b:1]"], "rollout.url", "got http://a:1, http://b:1, expected nothing: rollout.engine=vllm starts its own"),
    *(([SERVER, f"rollout.url={url}"], "rollout.url", f"got '{re.escape(url)}', expected scheme, host and port, such as http://10.0.0.7:8000")
      for url in ("10.0.0.7:8000", "ftp://a:1", "http://", "http://a:x", "http://a:0", "http://a:1/v1", "http://a:1?x=1")),
    ([SERVER, "rollout.url=[http://a:1,http://a:1]"], "rollout.url", "got one address twice, expected each server once"),
    (["rollout.max_staleness=2", "loss.tis=2"], "rollout.max_staleness", "got 2, expected 0 or 1: one rollout batch is sampled ahead"),
    ([STALE, "loss.tis=2", "rollout.sleep=true"], "rollout.sleep", "got true, expected false with rollout.max_staleness=1"),
    ([STALE], "rollout.max_staleness", "got 1, expected a correction .*: loss.tis=2.0, or rollout.correction"),
    (["rollout.temperature=0"], "rollout.temperature", "got 0, expected above 0: greedy completions of a group are all the same"),
    (["rollout.top_p=0", "loss.tis=2"], "rollout.top_p", "got 0, expected above 0, and 1 for all tokens"),
    (["rollout.top_p=0.9"], "rollout.top_p", "got a cut support, .*expected a correction beside it: loss.tis=2.0, or rollout.correction"),
    (["rollout.top_k=50"], "rollout.top_k", "got a cut support"),
    (["rollout.max_tokens=128"], "rollout.max_tokens", r"got 128, expected less than data.seq_length \(128\): prompt and completion share a row"),
    (["rollout.overlong_buffer=65"], "rollout.overlong_buffer", r"got 65, expected at most rollout.max_tokens \(64\)"),
    *((["loss.name=srft", f"rollout.advantage_scale={scale}"], "rollout.advantage_scale", f"got {scale}, expected group with loss srft")
      for scale in ("batch", "none")),
    *(([*overrides, "data.expert_samples=0"], "data.expert_samples", "got 0, expected at least 1: the loss has a share of expert data")
      for overrides in (["loss.name=chord"], ["loss.name=chord", "mu.peak=0.5", "mu.valley=0"], ["loss.name=my_package.my_loss", "mu.peak=0.5"])),
    (["rollout.updates=2", "checkpoint.interval=3"], "checkpoint.interval", r"got 3, expected a multiple of rollout.updates \(2\)"),
    (["rollout.updates=2", "train.eval_interval=3", "checkpoint.best=eval/heldout_nll"], "train.eval_interval",
     r"got 3, expected a multiple of rollout.updates \(2\) beside checkpoint.best"),
    *((["rollout.correction=opsm", f"loss.{name}=2"], "rollout.correction", f"got opsm beside loss.{name}, expected one of them")
      for name in ("tis", "icepop_low", "icepop_high")),
    *(([f"rollout.correction={correction}", "rollout.correction_bound=0"], "rollout.correction_bound", "got 0, expected above 0")
      for correction in ("sequence_mask", "sequence_tis")),
    (["rollout.devices=['0']", "rollout.engines=2"], "rollout.devices", r"got 1 entries, expected one for each of rollout.engines \(2\)"),
    (["rollout.updates=5"], "rollout.prompts", r"got 24, expected a multiple of rollout.updates \(5\)"),
]  # fmt: skip


@pytest.mark.parametrize("overrides, key, message", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_refused(small, overrides, key, message):
    error = refused(small, *overrides)
    assert error.key == key and re.search(message, error.reason), str(error)
    given = any(override.partition("=")[0].startswith(key) for override in overrides)
    assert error.where == "command line" if given else error.where == "default" or error.where.startswith(str(small))


ACCEPTED = [
    [],
    ["mu.peak=0.5", "loss.name=chord"],
    ["mu.peak=0.5", "loss.name=my_package.my_loss"],  # whether it mixes is not known before it is imported
    ["loss.name=srft"],
    ["data.prompts=p.jsonl"],
    ["loss.name=gspo"],
    ["loss.name=grpo", "parallel.context=2"],
    ["rollout.n=1", "rollout.advantage_scale=batch"],
    ["rollout.n=1", "rollout.advantage_scale=none"],
    [SERVER, "rollout.url=[http://10.0.0.7:8000,https://b:443/]"],
    [STALE, "loss.tis=2"],
    [STALE, "rollout.correction=sequence_tis"],
    ["rollout.sleep=true"],
    *(["rollout.top_p=0.9", correction] for correction in ("loss.tis=2", "loss.icepop_low=0.5", "loss.icepop_high=2", "rollout.correction=opsm")),
    ["rollout.max_tokens=127"],
    ["rollout.overlong_buffer=64"],
    ["rollout.updates=4"],
    ["loss.name=chord", "mu.peak=0", "mu.valley=0", "data.expert_samples=0"],
    ["data.expert_samples=0"],
    ["loss.name=srft", "data.expert_samples=0"],  # it has the demonstrations of its prompts
    ["loss.name=my_package.my_loss", "data.expert_samples=0"],
    ["rollout.updates=2", "checkpoint.interval=4"],
    ["rollout.updates=2", "train.eval_interval=4", "checkpoint.best=eval/heldout_nll"],
    ["rollout.updates=2", "train.eval_interval=3"],
    ["rollout.correction=opsm", "rollout.correction_bound=0"],
    ["rollout.devices=['0,1','2,3']", "rollout.engines=2"],
]


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_accepted(small, overrides):
    assert load_config(small, overrides).rollout is not None


def test_every_own_key_is_blamed_where_it_was_written(small):
    """In the file, on the command line, or nowhere: a default is at fault."""
    small.write_text(SMALL.replace("max_tokens: 64", "max_tokens: 64, temperature: 0"))
    assert refused(small).where == f"{small}:4"
    assert refused(small, "rollout.temperature=0.0").where == "command line"
    small.write_text(SMALL.replace("max_tokens: 64", "max_tokens: 64, n: 1").replace("n: 8, ", "").replace("prompts: 24", "updates: 5"))
    assert refused(small, "rollout.n=8").where == "default"  # 32 prompts, a multiple of 5 not


@pytest.mark.parametrize("loss", ["chord", "srft"])
def test_a_mixture_needs_the_section(tmp_path, loss):
    path = tmp_path / "alone.yaml"
    path.write_text(SMALL.partition("rollout")[0].replace("grpo", loss))
    error = refused(path)
    assert error.key == "loss.name" and error.where.startswith(str(path))
    assert f"got {loss}, expected a section rollout beside it" in error.reason and "use chord_phi or srft_demo" in error.reason
    assert load_config(path, [f"loss.name={'chord_phi' if loss == 'chord' else 'srft_demo'}"]).rollout is None


WORLD = [  # ranks, overrides -> key, message
    (5, [], "rollout.prompts", r"got 24, expected a multiple of 5 \(5 data-parallel ranks x rollout.updates 1\); try 25"),
    (3, ["rollout.updates=2"], "rollout.prompts", None),
    (4, ["rollout.updates=4"], "rollout.prompts", r"got 24, expected a multiple of 16 \(4 data-parallel ranks x rollout.updates 4\); try 32"),
    (2, ["rollout.engines=2"], "rollout.engines", None),
    (2, ["rollout.engines=3"], "rollout.engines", r"got 3, expected at most the data-parallel ranks \(2\): each has one leader"),
    (2, [SERVER, "rollout.url=http://a:1", "rollout.engines=3"], "rollout.engines", None),
    (4, ["data.expert_samples=9"], "data.expert_samples", None),  # grpo has none
    (4, ["loss.name=chord", "data.expert_samples=8"], "data.expert_samples", None),
    (4, ["loss.name=chord", "data.expert_samples=9"], "data.expert_samples", r"got 9, expected a multiple of the data-parallel ranks \(4\); try 12"),
]


@pytest.mark.parametrize("ranks, overrides, key, message", WORLD)
def test_data_parallel_ranks(small, ranks, overrides, key, message):
    wrong = list(check_rollout_world(load_config(small, overrides), ranks))
    if message is None:
        assert not wrong
        return
    (error,) = wrong
    assert error.key == key and re.search(message, error.reason)


def test_load_config_asks_with_the_data_parallel_ranks(small):
    """Four ranks of two are two data-parallel ones."""
    overrides = ["parallel.tensor=2", "rollout.prompts=6"]
    assert load_config(small, overrides, world_size=4).rollout.prompts == 6
    with pytest.raises(ConfigError, match="multiple of 4"):
        load_config(small, [*overrides, "parallel.tensor=1"], world_size=4)
