"""What cannot work of the sections `log` and `profile`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_plugin.config.errors import ConfigError
from megatron_plugin.config.schema import Config

__all__ = ["check_log", "check_profile_ranks"]

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Key of `log`, which is also the module -> what to install."""
PROJECT = re.compile(r"[^/\\#?%:]{1,128}(/[^/\\#?%:]{1,128})?")


def check_log(config: Config) -> Iterator[ConfigError]:
    """Of trackers, their addresses and packages, and of the steps that are profiled."""
    log = config.log
    if log.wandb and not PROJECT.fullmatch(log.wandb):
        yield _wrong(config, "log.wandb", f"got {log.wandb!r}, expected project or entity/project, without \\ # ? % :; the server is WANDB_BASE_URL")
    yield from _check_address(config)
    for key, package in PACKAGES.items():
        if getattr(log, key) and not _installed(key):
            yield _wrong(config, f"log.{key}", f"got {getattr(log, key)!r}, but the package {key} is not installed: pip install {package}, or leave it empty")
    first, steps = config.profile.first_step, config.train.steps
    if first > steps:
        yield _wrong(config, "profile.first_step", f"got {first}, expected at most train.steps ({steps})")
    if first and not config.profile.ranks:
        yield _wrong(config, "profile.ranks", "got none, expected the ranks that write a trace, such as 0")


def check_profile_ranks(config: Config, world_size: int) -> Iterator[ConfigError]:
    """For ranks that the job has not."""
    if config.profile.first_step and (strange := [rank for rank in config.profile.ranks if not 0 <= rank < world_size]):
        yield _wrong(config, "profile.ranks", f"got {', '.join(map(str, strange))}, expected ranks from 0 to {world_size - 1}")


def _check_address(config: Config) -> Iterator[ConfigError]:
    address = config.log.mlflow
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = None
    if parts is None or (parts.scheme and parts.scheme not in ("http", "https", "sqlite", "file")):
        yield _wrong(config, "log.mlflow", f"got {address!r}, expected http(s)://host:port, sqlite:///path or a directory")
    elif parts.username or parts.password:
        reason = "got an address with a name or password, expected them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: a configuration is kept and shown"
        yield _wrong(config, "log.mlflow", reason)


def _installed(module: str) -> bool:
    """A folder of that name in the working directory, as wandb makes one, is no package."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _wrong(config: Config, key: str, reason: str) -> ConfigError:
    return ConfigError(reason, key, config.sources.get(key, "default"))
