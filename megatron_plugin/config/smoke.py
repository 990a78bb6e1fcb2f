"""`train --smoke`: any configuration, made so small that it goes through everything on a laptop's CPU in seconds.

It is a layer of values over the file and below the command line: what an override says stays.  Every value it changes is printed, and has
"--smoke" as its origin in `config show` and config.yaml.  What a smoke run does not show: whether the real sizes fit and the real files can be read.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

from megatron_plugin.config.aliases import COMMAND_LINE
from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.schema import Config

__all__ = ["SMOKE", "fresh_run_dir", "smoke_line", "smoke_values"]

SMOKE = "--smoke"
MARK = ".smoke"
"""In a run directory that a smoke run made, and that the next one may remove."""
TRIES = 100
"""To make run_dir, which each other machine can rename once."""
STEPS, ROWS, TOKENS, WIDTH, COMPLETION = 2, 2, 128, 64, 16
HEAD = 32
"""Channels of a head: vLLM's attention on a CPU has none of 16."""
OFF: dict[str, Any] = {
    "fp8": None, "fp4": None, "gradient_accumulation_fusion": False, "apply_rope_fusion": False, "masked_softmax_fusion": False,
    "tp_comm_overlap": False, "enable_cuda_graph": False, "cpu_offloading": False, "num_moe_experts": None, "recompute_granularity": None,
    "recompute_method": None, "recompute_num_layers": None,
    "num_layers_in_first_pipeline_stage": None, "num_layers_in_last_pipeline_stage": None, "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False,
}  # fmt: skip
"""Fields of `model` that need a GPU, its packages, or layers that are gone; megatron-core's MoE layers and its
recomputation, which keeps the GPU's random state, do not run on a CPU."""


def smoke_values(config: Config, world_size: int) -> dict[str, Any]:
    """{section: {key: value}} of what changes; `config` has the overrides in it already, and keys that they set are left out."""
    given = {key for key, origin in config.sources.items() if origin.startswith(COMMAND_LINE)}
    sizes = _layout(config, world_size, given)
    wanted = {"run_dir": f"{config.run_dir.rstrip('/')}-smoke"} | {f"parallel.{name}": size for name, size in sizes.items()}
    wanted |= _model(config, sizes, given)
    ranks = max(1, world_size // (sizes["tensor"] * sizes["pipeline"] * sizes["context"]))
    wanted |= _log(config) | _train(config, sizes, ranks, given) | _data(config, sizes, ranks, given) | _rollout(config, ranks, given)
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        section, dot, inner = key.partition(".")
        if key in given or value == _now(config, key):
            continue
        if dot:
            found.setdefault(section, {})[inner] = value
        else:
            found[section] = value
    return found


def smoke_line(config: Config) -> str:
    """What --smoke has changed, as the overrides that would do the same: one line."""
    changed = [f"{key}={_text(_now(config, key))}" for key, origin in config.sources.items() if origin == SMOKE]
    return "smoke: " + " ".join(changed)


def fresh_run_dir(config: Config) -> None:
    """Removes what the last smoke run left in run_dir, and makes it; one rank of a machine calls it, at once with
    those of machines that share the file system.  Where an override names run_dir nothing is done.

    ConfigError for a directory that no smoke run made."""
    if config.sources.get("run_dir") != SMOKE:
        return
    folder = Path(config.run_dir)
    if _is_strange(folder) and _is_strange(folder):  # twice: another machine may have been removing it
        raise ConfigError("got what no smoke run made, expected nothing there or the last one's run, which is removed; move it, or say run_dir=...",
                          str(folder), SMOKE)  # fmt: skip
    with contextlib.suppress(FileNotFoundError):  # renamed first: what others make under its name meanwhile stays
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")))
    for left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARK).touch()
            return
        except (FileNotFoundError, FileExistsError):  # another machine has just renamed it
            if not left:
                raise


def _is_strange(folder: Path) -> bool:
    """Whether something is there that no smoke run made."""
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return folder.is_symlink()
    except NotADirectoryError:
        return True
    return folder.is_symlink() or (bool(names) and MARK not in names)


def _layout(config: Config, world_size: int, given: set[str]) -> dict[str, Any]:
    """As much of the configured layout as there are ranks for: tensor first, then pipeline, then context."""
    parallel, left = config.parallel, world_size
    sizes: dict[str, Any] = {}
    for name in sorted(("tensor", "pipeline", "context"), key=lambda name: f"parallel.{name}" not in given):
        size = getattr(parallel, name)
        sizes[name] = size if f"parallel.{name}" in given else math.gcd(size, left)
        left = max(1, left // max(1, sizes[name]))
    sizes["virtual"] = (parallel.virtual if "parallel.virtual" in given else min(parallel.virtual, 2)) if sizes["pipeline"] > 1 else 1
    sizes["sequence"] = parallel.sequence and sizes["tensor"] > 1
    return sizes


def _model(config: Config, sizes: dict[str, Any], given: set[str]) -> dict[str, Any]:
    model, tensor = config.model, sizes["tensor"]
    found = {f"model.{name}": value for name, value in OFF.items() if model.get(name)}
    chunks = sizes["pipeline"] * sizes["virtual"]
    found["model.num_layers"] = min(model["num_layers"], chunks * math.ceil(STEPS / chunks))
    if model["hidden_size"] <= WIDTH * tensor:
        return found
    heads = model["num_attention_heads"] if "model.num_attention_heads" in given else 2 * tensor
    small = {"num_attention_heads": heads, "hidden_size": HEAD * heads, "ffn_hidden_size": 3 * HEAD * heads, "num_query_groups": tensor, "kv_channels": HEAD}
    required = ("num_attention_heads", "hidden_size")
    return found | {f"model.{name}": value for name, value in small.items() if name in required or model.get(name)}


def _log(config: Config) -> dict[str, Any]:
    """Nothing for other people's servers, and one step of the profile on the first rank."""
    first = min(config.profile.first_step, 1)
    return {"log.wandb": "", "log.mlflow": "", "profile.first_step": first} | ({"profile.steps": 1, "profile.ranks": [0]} if first else {})


def _train(config: Config, sizes: dict[str, Any], ranks: int, given: set[str]) -> dict[str, Any]:
    train, updates = config.train, _updates(config, given)
    steps = train.steps if "train.steps" in given else min(train.steps, STEPS * updates)
    micro = train.micro_batch if "train.micro_batch" in given else min(train.micro_batch, ROWS)
    micro_batches = sizes["pipeline"] if sizes["virtual"] > 1 else 2  # with virtual stages they are taken so many at a time
    found = {"train.steps": steps, "train.micro_batch": micro, "train.warmup_steps": min(train.warmup_steps, steps - 1), "train.log_interval": 1,
             "train.eval_interval": steps if train.eval_interval else 0, "checkpoint.interval": updates if config.checkpoint.interval else 0,
             "checkpoint.init": "", "checkpoint.resume": "auto"}  # fmt: skip
    return found | ({} if config.rollout else {"train.global_batch": micro * ranks * micro_batches})


def _data(config: Config, sizes: dict[str, Any], ranks: int, given: set[str]) -> dict[str, Any]:
    data = config.data
    pieces = (2 * sizes["context"] if sizes["context"] > 1 else 1) * (sizes["tensor"] if sizes["sequence"] else 1)
    found = {
        "data.train": [], "data.eval": [], "data.prompts": [], "data.tokenizer": "", "data.chat_template": "",
        "data.bpe_vocab_size": min(data.bpe_vocab_size, 320), "data.seq_length": pieces * max(1, min(data.seq_length, TOKENS) // pieces),
        "data.eval_samples": min(data.eval_samples or 4, 4), "data.eval_answers": min(data.eval_answers, 2),
    }  # fmt: skip
    if config.rollout and data.expert_samples:
        found["data.expert_samples"] = ranks
    if "data.train" in given and data.overlong == "error":
        found["data.overlong"] = "truncate"  # at so few tokens hardly anything is short enough
    return found


def _rollout(config: Config, ranks: int, given: set[str]) -> dict[str, Any]:
    rollout = config.rollout
    if rollout is None:
        return {}
    longest = rollout.max_tokens if "rollout.max_tokens" in given else min(rollout.max_tokens, COMPLETION)
    updates = _updates(config, given)
    return {
        "rollout.engine": "vllm", "rollout.url": [], "rollout.engines": 1, "rollout.tensor": 1, "rollout.devices": [], "rollout.memory": 0.0,
        "rollout.transfer": "auto", "rollout.bind": "127.0.0.1", "rollout.prompts": 2 * ranks * updates, "rollout.n": min(rollout.n, 2),
        "rollout.updates": updates, "rollout.max_tokens": longest, "rollout.overlong_buffer": min(rollout.overlong_buffer, longest // 2),
        "rollout.dynamic_sampling": min(rollout.dynamic_sampling, 1), "rollout.eval_n": min(rollout.eval_n, 1),
    }  # fmt: skip


def _updates(config: Config, given: set[str]) -> int:
    """Optimizer steps of a rollout batch; 1 without rollouts."""
    if config.rollout is None:
        return 1
    return config.rollout.updates if "rollout.updates" in given else min(config.rollout.updates, 2)


def _now(config: Config, key: str) -> Any:
    section, _, inner = key.partition(".")
    value = getattr(config, section)
    return value if not inner else value.get(inner) if isinstance(value, dict) else getattr(value, inner)


def _text(value: Any) -> str:
    """As an override writes it."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else "" if value in ("", []) else str(value)
