"""Labels are looked at where they enter: on a GPU nothing later can say which sample a wrong one came from."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_plugin.data import IGNORE_INDEX, DataError, Sample

__all__ = ["check_labels"]


def check_labels(samples: Iterable[Sample], vocab_size: int) -> None:
    """DataError with sample and place for the first label that is neither in [0, vocab_size) nor -100; padding of the vocabulary is outside it."""
    for sample in samples:
        labels_T = sample.labels_T
        stray_T = ((labels_T < 0) | (labels_T >= vocab_size)) & (labels_T != IGNORE_INDEX)
        if stray_T.any():
            place = int(stray_T.nonzero()[0])
            raise DataError(
                f"got label {int(labels_T[place])} at token {place}, expected {IGNORE_INDEX} or one in [0, {vocab_size}): was it tokenized with another "
                "tokenizer? try 'megatron-plugin doctor'", sample.source,
            )  # fmt: skip
