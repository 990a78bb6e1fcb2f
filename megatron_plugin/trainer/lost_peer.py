"""What gloo, NCCL and the store say when another rank is gone: a consequence, whose cause that rank knows.  Imports nothing: the command asks too."""

from __future__ import annotations

__all__ = ["is_lost_peer"]

SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "DistBackendError", "DistNetworkError", "gloo/")


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone."""
    return any(sign in f"{type(error).__name__}: {error}" for sign in SIGNS)
