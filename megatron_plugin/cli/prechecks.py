"""What a command can know to be impossible before torch is imported, which takes seconds.

Each says what the part that would fail later says too; that part stays the judge of what only it can see (a damaged checkpoint, a bad line).
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plugin.config import Config, ConfigError, DataPathError
from megatron_plugin.config.errors import CheckpointPathError
from megatron_plugin.config.layout import layout_config
from megatron_plugin.config.load import read_file

__all__ = ["check_checkpoint", "check_hf_folder", "check_layout", "check_new_folder", "check_packages", "check_port", "check_reward", "check_served",
           "check_some_file", "check_tokenizer", "check_vllm_there", "run_of", "run_values"]  # fmt: skip

REWARDS = ("numeric", "math", "format")
"""Those of rollout/rewards.py, which imports torch."""
SCORED = ("seq_length", "packing", "train_on")
"""Keys of a run's `data` that score and eval can change."""


def run_of(path: str | Path) -> Path:
    """The run directory of a run or checkpoint."""
    path = Path(path)
    return path.parent.parent if _is_checkpoint(path) else path


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and (path.name.startswith("step_") or (path / "train_state.json").is_file())


def check_checkpoint(path: str | Path) -> None:
    """CheckpointPathError, exit code 3, unless there is a checkpoint, or a run directory that seems to have one."""
    path = Path(path)
    if not _is_checkpoint(path) and not any((path / "checkpoints").glob("step_*")):
        there = "a directory without a checkpoint" if path.is_dir() else "nothing" if not path.exists() else "a file"
        hint = "; it is a Hugging Face directory: megatron-plugin import makes a run directory of one" if (path / "config.json").is_file() else ""
        raise CheckpointPathError(f"got {path} ({there}), expected a checkpoint or a run directory that holds one in checkpoints/step_*{hint}")


def check_hf_folder(path: str | Path) -> None:
    """CheckpointPathError, exit code 3, unless it has a config.json."""
    if not (Path(path) / "config.json").is_file():
        raise CheckpointPathError(f"got {path}, expected a Hugging Face directory with a config.json; megatron-plugin export RUN_DIR DIR makes one of a run")


def run_values(path: str | Path) -> dict[str, Any]:
    """config.yaml of a run or checkpoint's run; {} where there is none, which is told later."""
    file = run_of(path) / "config.yaml"
    return read_file(file).values if file.is_file() else {}


def check_layout(values: dict[str, Any], overrides: Sequence[str], world_size: int, *, settable: tuple[str, ...]) -> None:
    """ConfigError for overrides that a command does not take, or that do not fit the model of `values` (of a run) and the number of ranks."""
    if isinstance(values.get("model"), dict):
        data = {key: value for key, value in (values.get("data") or {}).items() if key in SCORED}
        dtype = (values.get("train") or {}).get("dtype", "fp32")
        layout_config({"model": values["model"], "train": {"dtype": dtype}, "data": data}, overrides, world_size, settable=settable)


def check_new_folder(path: str | Path, what: str) -> None:
    """CheckpointPathError, exit code 3, where something is already."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointPathError(f"got {path}, which is not empty, expected {what}: choose another")


def check_some_file(names: Sequence[str]) -> None:
    """DataPathError, exit code 4, where none of the files is there."""
    if not any(Path(name).is_file() for name in names):
        raise DataPathError(f"got {', '.join(names)}, expected a jsonl file that exists, relative to {Path.cwd()}")


def check_tokenizer(directory: str) -> None:
    """DataPathError, exit code 4, where no tokenizer can be."""
    if not Path(directory).is_dir():
        there = "a file" if Path(directory).exists() else "nothing there"
        raise DataPathError(f"{directory}: no tokenizer (got {there}, expected a Hugging Face tokenizer directory)")


def check_reward(name: str, key: str = "--reward", where: str | None = None) -> None:
    """ConfigError for a built-in reward that there is not."""
    if name not in REWARDS and "." not in name:
        near = difflib.get_close_matches(name.lower(), REWARDS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(f"got {name!r}{hint}, expected one of {', '.join(REWARDS)}, or a function of yours as package.module.function", key, where)


def _check_importable(name: str, key: str, where: str | None) -> None:
    """ConfigError for package.module.function of a package that there is not."""
    top, dot, _ = name.partition(".")
    if dot and top not in sys.modules and (not top or importlib.util.find_spec(top) is None):
        raise ConfigError(f"got {name!r}, but no package {top!r} is on the Python path, expected package.module.function of one that is", key, where)


def check_served(model: str) -> None:
    """CheckpointPathError, exit code 3, unless the folder can be a model's for vLLM; ConfigError for a run directory, whose model is in engine/."""
    inner = Path(model) / "engine"
    if not (Path(model) / "config.json").is_file() and (inner / "config.json").is_file():
        raise ConfigError(f"got {model}, a run directory, expected a model's; try {inner}", "MODEL_DIR")
    check_hf_folder(model)


def check_port(port: int) -> None:
    """ConfigError for a number that no port has."""
    if not 0 < port < 65536:
        raise ConfigError(f"got {port}, expected a port from 1 to 65535", "--port")


def check_vllm_there(key: str, where: str | None = None) -> None:
    """ConfigError where there is no vLLM, or one that is not supported."""
    from megatron_plugin.rollout.vllm_versions import check_vllm

    try:
        check_vllm()
    except RuntimeError as error:
        raise ConfigError(f"{error}; `megatron-plugin doctor` says what else is missing", key, where) from error


def check_packages(config: Config) -> None:
    """ConfigError for what a run of `config` needs and is not installed."""
    _check_importable(config.loss_name, "loss.name", config.sources.get("loss.name"))
    if config.rollout is None:
        return
    rewards = config.rollout.reward if isinstance(config.rollout.reward, dict) else [config.rollout.reward]
    for name in rewards:
        check_reward(str(name), "rollout.reward", config.sources.get("rollout.reward"))
    if config.rollout.engine == "vllm":
        check_vllm_there("rollout.engine", config.sources.get("rollout.engine"))
