"""The configuration of a command that only reads or writes weights: a model, and how this job cuts it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.load import load_config
from megatron_plugin.config.schema import Config

__all__ = ["layout_config"]


def layout_config(values: dict[str, Any], overrides: Sequence[str], world_size: int, *, settable: tuple[str, ...]) -> Config:
    """The checked configuration of what only reads or writes weights: that of `values`, with this job's layout.

    ConfigError for an override that is not among `settable` (beginnings)."""
    for override in overrides:
        if not override.startswith(settable):
            raise ConfigError(f"got the override {override!r}, expected {' or '.join(f'{s}...' for s in settable)} here; other keys are those of training")
    batch = {"micro_batch": 1, "global_batch": world_size}  # nothing is trained, but the ranks left over must divide it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(values | {"train": values["train"] | batch}))
        try:
            return load_config(file, overrides, world_size=world_size)
        except ConfigError as error:  # where it stands in a file that is gone says nothing
            error.args = (re.sub(rf"{re.escape(str(file))}(:\d+)?", "the model", str(error)),)
            raise
