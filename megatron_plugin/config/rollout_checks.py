"""What of the section `rollout` can be known to be impossible before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.loss_roles import LOSS_ROLES
from megatron_plugin.config.schema import Config

__all__ = ["CORRECTIONS", "check_rollout", "check_rollout_world"]

CORRECTIONS = ("tis", "icepop_low", "icepop_high")
"""Parameters of losses that correct the rollout-trainer mismatch token by token."""


def check_rollout(config: Config) -> Iterator[ConfigError]:
    """What is wrong with a section that cannot work, or for what needs one and has none."""
    rollout = config.rollout
    if rollout is None:
        if config.loss_name in LOSS_ROLES and config.role.mixes:
            yield _wrong(config, "loss.name", f"got {config.loss_name}, expected a section rollout beside it: it mixes expert data with rollouts; "
                  "for supervised training use chord_phi or srft_demo")  # fmt: skip
        return
    yield from _check_engine(config)
    yield from _check_sampling(config)
    if config.mu is not None and not config.role.mu:
        yield _wrong(config, "mu", f"got a schedule, expected none: loss {config.loss_name} has no share of expert data; leave it out, or use loss.name=chord")
    if config.role.demonstrations and config.data.prompts:
        yield _wrong(config, "data.prompts", f"got files, expected none with loss {config.loss_name}: its prompts are those of the demonstrations in data.train")
    if config.loss_name == "gspo" and config.parallel.context > 1:
        yield _wrong(config, "parallel.context", f"got {config.parallel.context}, expected 1 with loss gspo: its ratio is over whole sequences, which context "
              "parallelism cuts")  # fmt: skip
    if config.role.demonstrations and rollout.advantage_scale != "group":
        yield _wrong(config, "rollout.advantage_scale", f"got {rollout.advantage_scale}, expected group with loss {config.loss_name}: its advantages are over the group that "
              "holds the demonstration")  # fmt: skip
    if config.data.expert_samples == 0 and _uses_experts(config):
        yield _wrong(config, "data.expert_samples", "got 0, expected at least 1: the loss has a share of expert data; for none of it take loss.name=grpo, or "
              "mu.peak=0 and mu.valley=0")  # fmt: skip
    if config.checkpoint.interval % rollout.updates:
        yield _wrong(config, "checkpoint.interval", f"got {config.checkpoint.interval}, expected a multiple of rollout.updates ({rollout.updates}): a run cannot be "
              "resumed between the updates of one rollout batch")  # fmt: skip
    if config.checkpoint.best and config.train.eval_interval % rollout.updates:
        yield _wrong(config, "train.eval_interval", f"got {config.train.eval_interval}, expected a multiple of rollout.updates ({rollout.updates}) beside "
              "checkpoint.best: it saves after an evaluation, and a run cannot be resumed between the updates of one rollout batch")  # fmt: skip
    if rollout.advantage_scale == "group" and rollout.n == 1:
        yield _wrong(config, "rollout.n", "got 1, expected at least 2: a group of one has no advantage; or set rollout.advantage_scale=none or batch")


def _check_engine(config: Config) -> Iterator[ConfigError]:
    rollout = config.rollout
    if (rollout.engine == "server") != bool(rollout.url):
        expected = "the addresses of running servers" if rollout.engine == "server" else "nothing: rollout.engine=vllm starts its own"
        yield _wrong(config, "rollout.url", f"got {', '.join(rollout.url) or 'nothing'}, expected {expected}")
    for url in rollout.url:
        parts = urlsplit(url)
        if "@" in parts.netloc:  # not shown
            yield _wrong(config, "rollout.url", "got an address with a user or password in it, expected scheme, host and port: it would be written into "
                         "config.yaml and logs, and the server asks for none")  # fmt: skip
        elif parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts) or parts.path.strip("/") or parts.query:
            yield _wrong(config, "rollout.url", f"got {url!r}, expected scheme, host and port, such as http://10.0.0.7:8000")
    if len(set(rollout.url)) < len(rollout.url):
        yield _wrong(config, "rollout.url", "got one address twice, expected each server once")
    if rollout.devices and len(rollout.devices) != rollout.engines:
        yield _wrong(config, "rollout.devices", f"got {len(rollout.devices)} entries, expected one for each of rollout.engines ({rollout.engines}), such as "
              "['4,5', '6,7']")  # fmt: skip
    if rollout.max_staleness > 1:
        yield _wrong(config, "rollout.max_staleness", f"got {rollout.max_staleness}, expected 0 or 1: one rollout batch is sampled ahead, not more")
    if rollout.max_staleness and rollout.sleep:
        yield _wrong(config, "rollout.sleep", "got true, expected false with rollout.max_staleness=1: the engine samples while the trainer trains")
    if rollout.max_staleness == 1 and not _corrected(config):
        yield _wrong(config, "rollout.max_staleness", "got 1, expected a correction for samples of older weights beside it: loss.tis=2.0, or rollout.correction")


def _has_port(parts: SplitResult) -> bool:
    """Whether the port is a number that there is, or left out."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _check_sampling(config: Config) -> Iterator[ConfigError]:
    rollout = config.rollout
    if rollout.temperature == 0:
        yield _wrong(config, "rollout.temperature", "got 0, expected above 0: greedy completions of a group are all the same")
    if rollout.temperature > 2:
        yield _wrong(config, "rollout.temperature", f"got {rollout.temperature}, expected at most 2, the highest that vLLM takes")
    if rollout.top_p == 0:
        yield _wrong(config, "rollout.top_p", "got 0, expected above 0, and 1 for all tokens")
    if (rollout.top_p < 1 or rollout.top_k > 0) and not _corrected(config):
        key = "rollout.top_p" if rollout.top_p < 1 else "rollout.top_k"
        yield _wrong(config, key, "got a cut support, which the trainer's log-probabilities do not have, expected a correction beside it: loss.tis=2.0, "
              "or rollout.correction")  # fmt: skip
    if rollout.correction != "none" and any(name in config.loss for name in CORRECTIONS):
        named = ", ".join(f"loss.{name}" for name in CORRECTIONS if name in config.loss)
        yield _wrong(config, "rollout.correction", f"got {rollout.correction} beside {named}, expected one of them: each multiplies by the same ratio")
    if rollout.correction_bound == 0 and rollout.correction not in ("none", "opsm"):
        yield _wrong(config, "rollout.correction_bound", "got 0, expected above 0: no completion would be kept")
    if rollout.max_tokens >= config.data.seq_length:
        yield _wrong(config, "rollout.max_tokens", f"got {rollout.max_tokens}, expected less than data.seq_length ({config.data.seq_length}): "
              "prompt and completion share a row")  # fmt: skip
    if rollout.overlong_buffer > rollout.max_tokens:
        yield _wrong(config, "rollout.overlong_buffer", f"got {rollout.overlong_buffer}, expected at most rollout.max_tokens ({rollout.max_tokens})")
    if rollout.prompts % rollout.updates:
        yield _wrong(config, "rollout.prompts", f"got {rollout.prompts}, expected a multiple of rollout.updates ({rollout.updates})")


def check_rollout_world(config: Config, ranks: int) -> Iterator[ConfigError]:
    """The same, with the number of data-parallel ranks."""
    rollout = config.rollout
    unit = ranks * rollout.updates
    if rollout.prompts % unit:
        because = f"{ranks} data-parallel ranks x rollout.updates {rollout.updates}"
        yield _wrong(config, "rollout.prompts", f"got {rollout.prompts}, expected a multiple of {unit} ({because}); try {-(-rollout.prompts // unit) * unit}")
    if rollout.engine == "vllm" and rollout.engines > ranks:
        yield _wrong(config, "rollout.engines", f"got {rollout.engines}, expected at most the data-parallel ranks ({ranks}): each has one leader")
    if config.role.mixes and not config.role.demonstrations and config.data.expert_samples % ranks:
        got = config.data.expert_samples
        yield _wrong(config, "data.expert_samples", f"got {got}, expected a multiple of the data-parallel ranks ({ranks}); try {-(-got // ranks) * ranks}")


def _uses_experts(config: Config) -> bool:
    """Whether a step may hold expert samples of data.expert_samples; srft takes the demonstrations of its prompts instead."""
    return config.role.mu and not config.role.demonstrations and (config.mu is None or config.mu.peak > 0 or config.mu.valley > 0)


def _corrected(config: Config) -> bool:
    return config.rollout.correction != "none" or any(name in config.loss for name in CORRECTIONS)


def _wrong(config: Config, key: str, reason: str) -> ConfigError:
    where = next((origin for name, origin in config.sources.items() if name == key or name.startswith(f"{key}.")), "default")
    return ConfigError(reason, key, where)
