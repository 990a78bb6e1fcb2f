"""What can be known to be impossible without torch: sizes, shares, and how they fit each other and the number of ranks."""

from __future__ import annotations

import ast
import difflib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_plugin.config.errors import CheckpointPathError, ConfigError, DataPathError, raise_all
from megatron_plugin.config.log_checks import check_log, check_profile_ranks
from megatron_plugin.config.loss_fields import check_loss_fields
from megatron_plugin.config.megatron_fields import CHOICES, accepts, model_fields
from megatron_plugin.config.rollout_checks import check_rollout, check_rollout_world
from megatron_plugin.config.schema import Config

__all__ = ["check", "check_files", "check_folder"]

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A directory without any of them holds no tokenizer."""
SMALLEST_BPE = 263  # 256 bytes and 7 control tokens (data/tokenizer.py)
LOWEST = {
    1: ("train.steps", "train.max_nonfinite", "train.micro_batch", "train.global_batch", "train.log_interval", "train.timeout_s", "parallel.tensor",
        "parallel.pipeline", "parallel.virtual", "parallel.context", "model.num_layers", "model.hidden_size", "model.num_attention_heads",
        "model.num_query_groups", "model.ffn_hidden_size", "model.kv_channels", "model.make_vocab_size_divisible_by", "model.rotary_base",
        "rollout.engines", "rollout.tensor", "rollout.start_timeout_s", "rollout.timeout_s", "rollout.bucket_mb", "rollout.prompts", "rollout.n",
        "rollout.updates", "rollout.max_tokens", "profile.steps"),
    0: ("seed", "train.spike_factor", "train.lr", "train.min_lr", "train.warmup_steps", "train.weight_decay", "train.adam_eps", "train.clip_grad",
        "train.eval_interval", "data.eval_samples", "data.eval_answers", "checkpoint.interval", "checkpoint.keep", "mu.warmup_steps", "mu.decay_steps",
        "data.expert_samples", "rollout.memory", "rollout.top_k", "rollout.max_staleness", "rollout.dynamic_sampling", "rollout.overlong_buffer",
        "rollout.overlong_penalty", "rollout.eval_n", "rollout.max_restarts", "rollout.correction_bound", "rollout.temperature", "log.peak_tflops",
        "model.layernorm_epsilon",
        "profile.first_step"),
    2: ("data.seq_length",),
    SMALLEST_BPE: ("data.bpe_vocab_size",),
}  # fmt: skip
SHARES = ("train.adam_beta1", "train.adam_beta2", "data.max_bad_fraction", "data.filler", "mu.peak", "mu.valley", "ramp.warmup_ratio", "ramp.transition_ratio", "rollout.top_p",
          "model.hidden_dropout", "model.attention_dropout", "model.rotary_percent")  # fmt: skip
# With these, layers may be spread unevenly over the stages; megatron-core checks them itself.
UNEVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
          "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")  # fmt: skip


def check(config: Config, world_size: int | None = None, wrong: Sequence[ConfigError] = ()) -> None:
    """ConfigError with everything that cannot work; `world_size` None leaves out what depends on the number of ranks.

    First what each value says by itself, after what else is `wrong`; only when nothing is, how they fit each other: what follows from a
    mistake is none of its own."""
    raise_all(_of_each_key([*wrong, *_check_loss(config), *check_loss_fields(config), *_check_model(config, missing=not wrong), *_check_ranges(config)]))
    fits = (*_check_training(config), *_check_layout(config), *check_rollout(config), *check_log(config), *_check_world(config, world_size))
    raise_all(_of_each_key(fits))


def _of_each_key(errors: Sequence[ConfigError]) -> list[ConfigError]:
    """The first one about each key: its reason is enough."""
    found: dict[str | None, ConfigError] = {}
    for error in errors:
        found.setdefault(error.key, error)
    return list(found.values())


def check_folder(path: str | Path, key: str, where: str | None = None) -> None:
    """ConfigError for a directory that could not be made, or written to; a file without a name is, in it or in the nearest one above that is there."""
    above = Path(path).absolute()
    try:
        while not above.exists():
            above = above.parent
        with tempfile.TemporaryFile(dir=above):  # what may be written says little, as root and on file systems that are none
            pass
    except OSError as error:
        reason = f"got {str(path)!r}, but {above} takes no file ({error.strerror}), expected a directory that can be made and written"
        raise ConfigError(reason, key, where) from error


def check_files(config: Config) -> None:
    """DataPathError with every file or directory that `data` names and that does not exist, CheckpointPathError for one of `checkpoint`, ConfigError
    for a run_dir that cannot be written: found here, before torch is imported."""
    data, missing = config.data, []
    files = {"data.train": data.train, "data.eval": data.eval, "data.prompts": data.prompts, "data.chat_template": [data.chat_template]}
    for key, paths in files.items():
        for path in paths:
            if path and not (Path(path).is_file() and Path(path).stat().st_size):
                there = "an empty file" if Path(path).is_file() else "a directory" if Path(path).is_dir() else "nothing"
                home = "; ~ is not expanded here" if path.startswith("~") else ""
                reason = f"got {path!r}, which is {there}, expected a file with something in it, relative to {Path.cwd()}{home}"
                missing.append(DataPathError(reason, key, config.sources.get(key)))
    if data.tokenizer and not any((Path(data.tokenizer) / name).is_file() for name in TOKENIZER):
        reason = f"got {data.tokenizer!r}, expected a directory with tokenizer.json; leave it empty to train a byte-level BPE"
        missing.append(DataPathError(reason, "data.tokenizer", config.sources.get("data.tokenizer")))
    raise_all([*missing, *_missing_checkpoints(config)])
    check_folder(config.run_dir, "run_dir", config.sources.get("run_dir"))


def _missing_checkpoints(config: Config) -> Iterator[CheckpointPathError]:
    """checkpoint.init is not looked at by a run that goes on from a checkpoint of its own."""
    wanted = config.checkpoint
    named = {"checkpoint.resume": wanted.resume} if wanted.resume not in ("auto", "never") else {}
    if not named and not any((Path(config.run_dir) / "checkpoints").glob("step_*")):
        named = {"checkpoint.init": wanted.init}
    for key, path in named.items():
        if path and not (any((Path(path) / "checkpoints").glob("step_*")) or (Path(path) / "train_state.json").is_file() or Path(path).name.startswith("step_")):
            reason = f"got {path!r}, expected a run directory or checkpoint that exists, relative to {Path.cwd()}; train or import it first"
            yield CheckpointPathError(reason, key, config.sources.get(key))


def _wrong(config: Config, key: str, reason: str) -> ConfigError:
    return ConfigError(reason, key, config.sources.get(key, "default"))


def _check_loss(config: Config) -> Iterator[ConfigError]:
    for key, value in config.loss.items():
        if key == "name":
            if not isinstance(value, str) or not value:
                yield _wrong(config, "loss.name", f"got {value!r}, expected the name of a loss, such as dft")
        elif not isinstance(value, (int, float, bool, str)) or (isinstance(value, float) and not math.isfinite(value)):
            yield _wrong(config, f"loss.{key}", f"got {value!r}, expected a finite number, true, false or text")
    if config.ramp is not None and "ramp" in config.loss:
        yield _wrong(config, "loss.ramp", f"got {config.loss['ramp']} beside a section ramp, expected one of the two: a constant, or a schedule")


def _check_model(config: Config, *, missing: bool) -> Iterator[ConfigError]:
    """`missing`: whether a key that is not there is a mistake, not the consequence of one."""
    for key in REQUIRED:
        if missing and key not in config.model:
            yield ConfigError("got nothing, expected a whole number: it has no default; see configs/sft.yaml", f"model.{key}")
    for key, value in config.model.items():
        annotation = model_fields()[key]
        if key in CHOICES:
            if value not in CHOICES[key]:
                yield _wrong(config, f"model.{key}", f"got {value!r}, expected one of {', '.join(CHOICES[key])}")
        elif not accepts(annotation, value):
            yield _wrong(config, f"model.{key}", f"got {value!r}, expected {ast.unparse(annotation)}")


def _check_ranges(config: Config) -> Iterator[ConfigError]:
    sections = {name: section for name, section in asdict(config).items() if isinstance(section, dict)}
    values = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()} | {"seed": config.seed}
    values = {key: value for key, value in values.items() if isinstance(value, (int, float))}  # what has another type is told as that
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield _wrong(config, key, f"got {value}, expected a finite number")
    for lowest, keys in LOWEST.items():
        for key in keys:
            if values.get(key) is not None and values[key] < lowest:
                yield _wrong(config, key, f"got {values[key]}, expected at least {lowest}")
    for key in SHARES:
        if values.get(key) is not None and not 0 <= values[key] <= 1:
            yield _wrong(config, key, f"got {values[key]}, expected a number in [0, 1]")


def _check_training(config: Config) -> Iterator[ConfigError]:
    train, mu = config.train, config.mu
    if train.lr == 0:
        yield _wrong(config, "train.lr", "got 0, expected a positive learning rate")
    if train.min_lr > train.lr:
        yield _wrong(config, "train.min_lr", f"got {train.min_lr}, expected at most train.lr ({train.lr})")
    if train.warmup_steps >= train.steps:
        reason = f"got {train.warmup_steps}, expected fewer than train.steps ({train.steps}); try train.warmup_steps=0"
        yield _wrong(config, "train.warmup_steps", reason)
    for key, beta in {"train.adam_beta1": train.adam_beta1, "train.adam_beta2": train.adam_beta2}.items():
        if beta >= 1:
            yield _wrong(config, key, f"got {beta}, expected less than 1")
    if 0 < train.spike_factor <= 1:
        yield _wrong(config, "train.spike_factor", f"got {train.spike_factor}, expected more than 1, or 0 for never: half of all steps are above the median")
    if train.global_batch % train.micro_batch:
        yield _wrong(config, "train.global_batch", _multiple(train.global_batch, train.micro_batch, f"train.micro_batch {train.micro_batch}"))
    if mu is not None and mu.valley > mu.peak:
        yield _wrong(config, "mu.valley", f"got {mu.valley}, expected at most mu.peak ({mu.peak}); are they exchanged?")
    if not config.checkpoint.resume:
        yield _wrong(config, "checkpoint.resume", "got nothing, expected auto, never or the path of a checkpoint")
    metrics = evaluated(config)
    if config.checkpoint.best and config.checkpoint.best not in metrics:
        near = difflib.get_close_matches(config.checkpoint.best, metrics, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the evaluations of this run have {', '.join(metrics) or 'none, for data.eval is empty'}"
        yield _wrong(config, "checkpoint.best", f"got {config.checkpoint.best!r}, expected a metric of every evaluation; {hint}")
    if unknown := [name for name in config.checkpoint.may_differ if name not in model_fields()]:
        yield _wrong(config, "checkpoint.may_differ", f"got {', '.join(unknown)}, expected fields of `model`, such as rotary_base")


def evaluated(config: Config) -> list[str]:
    """Metrics of every evaluation of a run (trainer/supervised.py, onpolicy.py); the accuracy is measured only after the last step."""
    data, rollout = config.data, config.rollout
    sets = [Path(path).stem if len(data.eval) > 1 else "heldout" for path in data.eval] or ([] if data.train else ["heldout", "ood"])
    kinds = ["nll"] if rollout is None else ["nll", "reward_greedy", *(["reward_sampled"] if rollout.eval_n else [])]
    return [f"eval/{name}_{kind}" for name in sets for kind in kinds]


def _multiple(got: int, of: int, because: str) -> str:
    return f"got {got}, expected a multiple of {of} ({because}); try {max(1, math.ceil(got / of)) * of}"


def _check_layout(config: Config) -> Iterator[ConfigError]:
    parallel, model, tensor = config.parallel, config.model, config.parallel.tensor
    heads, hidden, layers = model["num_attention_heads"], model["hidden_size"], model["num_layers"]
    if model.get("kv_channels") is None and hidden % heads:
        yield _wrong(config, "model.hidden_size", _multiple(hidden, heads, f"model.num_attention_heads {heads}"))
    if heads % tensor:
        yield _wrong(config, "model.num_attention_heads", _multiple(heads, tensor, f"parallel.tensor {tensor}"))
    groups = model.get("num_query_groups") or heads
    if heads % groups:
        yield _wrong(config, "model.num_query_groups", f"got {groups}, expected a divisor of model.num_attention_heads ({heads})")
    if groups != heads and groups % tensor and tensor % groups:
        yield _wrong(config, "model.num_query_groups", f"got {groups}, expected a multiple or a divisor of parallel.tensor ({tensor})")
    ffn = model.get("ffn_hidden_size") or 4 * hidden
    if ffn % tensor:
        yield _wrong(config, "model.ffn_hidden_size", _multiple(ffn, tensor, f"parallel.tensor {tensor}"))
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield _wrong(config, "parallel.virtual", f"got {parallel.virtual}, expected 1 without pipeline stages; set parallel.pipeline above 1")
    chunks = parallel.pipeline * parallel.virtual
    if layers % chunks and not any(model.get(key) for key in UNEVEN):
        because = f"parallel.pipeline {parallel.pipeline} x parallel.virtual {parallel.virtual}"
        yield _wrong(config, "model.num_layers", _multiple(layers, chunks, because))
    yield from _check_row(config)


def _check_row(config: Config) -> Iterator[ConfigError]:
    """The tokens of a row over context and sequence-parallel ranks."""
    parallel, length = config.parallel, config.data.seq_length
    if parallel.sequence and parallel.tensor == 1:
        yield _wrong(config, "parallel.sequence", "got true, expected false while parallel.tensor is 1; set parallel.tensor above 1")
    pieces, because = 1, []
    if parallel.context > 1:
        pieces, because = 2 * parallel.context, [f"2 x parallel.context {parallel.context}"]  # each rank has one piece of both halves
    if parallel.sequence:
        pieces, because = pieces * parallel.tensor, [*because, f"parallel.tensor {parallel.tensor} with parallel.sequence"]
    if length % pieces:
        yield _wrong(config, "data.seq_length", _multiple(length, pieces, " x ".join(because)))


def _check_world(config: Config, world_size: int | None) -> Iterator[ConfigError]:
    if world_size is None:
        return
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size < 1 or world_size % model_ranks:
        sizes = f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} x parallel.context {parallel.context}"
        key = next((key for key in ("tensor", "pipeline", "context") if getattr(parallel, key) > 1), "tensor")
        yield ConfigError(
            f"got {world_size} rank{'s' if world_size != 1 else ''}, expected a multiple of {model_ranks} ({sizes}); start it with "
            f"torchrun --nproc-per-node {model_ranks} -m megatron_plugin.cli train ..., or change the sizes",
            "world size", config.sources.get(f"parallel.{key}"),
        )  # fmt: skip
        return
    yield from check_profile_ranks(config, world_size)
    ranks = config.data_parallel(world_size)
    if config.rollout is not None:
        yield from check_rollout_world(config, ranks)
        return
    if train.global_batch % (train.micro_batch * ranks):
        because = f"train.micro_batch {train.micro_batch} x {ranks} data-parallel ranks"
        yield _wrong(config, "train.global_batch", _multiple(train.global_batch, train.micro_batch * ranks, because))
    micro_batches = config.num_micro_batches(world_size)
    if parallel.virtual > 1 and config.model.get("microbatch_group_size_per_vp_stage") is None and micro_batches % parallel.pipeline:
        unit = train.micro_batch * ranks * parallel.pipeline
        because = f"with parallel.virtual, the micro-batches of a rank, {micro_batches}, are taken {parallel.pipeline} at a time"
        yield _wrong(config, "train.global_batch", _multiple(train.global_batch, unit, because))

