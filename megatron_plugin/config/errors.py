"""One error for everything wrong with a configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["ConfigError", "DataPathError", "as_config_error"]


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


@contextlib.contextmanager
def as_config_error(key: str, where: str | None = None) -> Iterator[None]:
    """What a library raises about its arguments (`bind`, TransformerConfig) becomes a ConfigError about `key`: exit code 2."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(str(error) or repr(error), key, where) from error
