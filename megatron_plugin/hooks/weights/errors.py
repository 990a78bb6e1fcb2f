"""One error for everything wrong with a Hugging Face directory, or with a model that does not fit it."""

from __future__ import annotations

__all__ = ["WeightsError"]


class WeightsError(ValueError):
    """Weights that cannot be imported or exported.  The text says got, expected, where (field, tensor, file) and the remedy."""

    exit_code = 3
