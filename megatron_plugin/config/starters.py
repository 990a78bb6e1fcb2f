"""The configurations that come with the package, and a copy of them to begin from: an installed package has no configs/ where one works."""

from __future__ import annotations

from pathlib import Path

from megatron_plugin.config.errors import ConfigError

__all__ = ["SHIPPED", "write_starters"]

SHIPPED = Path(__file__).parents[1] / "configs"


def write_starters(folder: str | Path) -> list[Path]:
    """Copies the YAML files and their README into `folder`, which is made; returns the copies.

    A file that is there already stays if it is the same; ConfigError, before anything is written, if it is not: it may be somebody's work."""
    target = Path(folder)
    texts = {target / source.name: source.read_bytes() for source in sorted(SHIPPED.iterdir()) if source.suffix in (".yaml", ".md")}
    try:
        if edited := [path.name for path, text in texts.items() if path.exists() and path.read_bytes() != text]:
            raise ConfigError(f"got a folder whose {', '.join(edited)} is not as shipped, expected a new folder: name another, or move what is yours",
                              where=str(target))  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_bytes(text)
    except OSError as error:
        raise ConfigError(f"cannot write configurations there: {error.strerror}; name a folder that can be written", where=str(target)) from error
    return list(texts)
