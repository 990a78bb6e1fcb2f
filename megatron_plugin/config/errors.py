"""One error for everything wrong with a configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

__all__ = ["CheckpointPathError", "ConfigError", "DataPathError", "as_config_error", "raise_all"]


class ConfigError(ValueError):
    """A configuration that cannot be run.  `reason` says got, expected and the remedy; `key` is the dotted key, `where` its origin."""

    exit_code = 2

    def __init__(self, reason: str, key: str | None = None, where: str | None = None):
        super().__init__(": ".join(part for part in (where, key, reason) if part))
        self.reason = reason
        self.key = key
        self.where = where


class DataPathError(ConfigError):
    """`data` names a file or directory that is not there.  The exit code of DataError, which cannot be used: importing it imports torch."""

    exit_code = 4


class CheckpointPathError(ConfigError):
    """`checkpoint` names what is not there.  The exit code of CheckpointError, which cannot be used: importing it imports torch."""

    exit_code = 3


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Nothing for no error; else the first one, which also says all the others, so that one run shows every mistake."""
    if not errors:
        return
    first, others = errors[0], dict.fromkeys(f"  also {error}" for error in errors[1:])
    raise type(first)("\n".join([first.reason, *others]), first.key, first.where)


@contextlib.contextmanager
def as_config_error(key: str, where: str | None = None) -> Iterator[None]:
    """What a library raises about its arguments (`bind`, TransformerConfig) becomes a ConfigError about `key`: exit code 2."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(str(error) or repr(error), key, where) from error
