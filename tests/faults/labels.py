"""Labels that no vocabulary has: at the data boundary, in the op, and where nothing checks."""

from pathlib import Path

import pytest
import torch

from megatron_plugin.data import DataError, Sample
from megatron_plugin.trainer.labels import check_labels
from tests.faults.label_ranks import TRUE, fuzzed
from tests.faults.promises import Case
from tests.spawn import on_ranks

PROMISE = ("a label outside the vocabulary (negative but not -100, in the padding, beyond): an error with sample and place where data enter, an error in the op on "
           "a CPU, and with no check at all never a finite value, on every rank of TP 1, 2 and 4")  # fmt: skip
RANKS = "tests.faults.label_ranks"


def cases(*, full: bool) -> list[Case]:
    if not full:
        return [_unchecked(2, 1000, "eager"), _boundary(500)]
    made = [_unchecked(size, 10_000, backend) for size in (1, 2, 4) for backend in ("eager", "cpp")]
    return [*made, *[_checked(size, 500) for size in (1, 2, 4)], _boundary(10_000)]


def _strays(labels: torch.Tensor) -> torch.Tensor:
    return ((labels < 0) | (labels >= TRUE)) & (labels != -100)


def _unchecked(size: int, rows: int, backend: str) -> Case:
    def run(folder: Path) -> None:
        logits, labels = fuzzed(rows, seed=size)
        stray, masked = _strays(labels), labels == -100
        expected = torch.log_softmax(logits[:, :TRUE].double(), 1).gather(1, labels.clamp(0, TRUE - 1)[:, None])[:, 0]
        found = on_ranks(size, RANKS, "unchecked", rows=rows, seed=size, backend=backend)
        assert stray.sum() > rows / 3 and masked.sum() > rows / 20 and (~stray & ~masked).sum() > rows / 6
        for logp, _ in found:
            assert logp[stray].isnan().all(), "a stray label has a value"
            assert not logp[masked].any()
            good = ~stray & ~masked
            torch.testing.assert_close(logp[good].double(), expected[good], rtol=1e-5, atol=1e-4)
        gradient = torch.cat([grad for _, grad in found], 1)[:, :TRUE]
        assert gradient[stray].isnan().all() and not gradient[masked].any() and gradient[~stray].isfinite().all()

    return Case(f"TP{size} unchecked, {backend}", run, tries=rows)


def _checked(size: int, rows: int) -> Case:
    def run(folder: Path) -> None:
        _, labels = fuzzed(rows, seed=10 + size)
        for errors in on_ranks(size, RANKS, "checked", rows=rows, seed=10 + size, backend="auto"):
            for label, stray, error in zip(labels.tolist(), _strays(labels).tolist(), errors, strict=True):
                assert (error is not None) == stray and (error is None or f"label {label} at" in error), (label, error)

    return Case(f"TP{size} checked", run, tries=rows)


def _boundary(rows: int) -> Case:
    def run(folder: Path) -> None:
        _, labels = fuzzed(rows, seed=20)
        for number, (label, stray) in enumerate(zip(labels.tolist(), _strays(labels).tolist(), strict=True), 1):
            row = torch.tensor([-100, 5, -100, 7])
            row[2] = label
            sample = Sample(row.clamp(min=0), row, torch.ones(4), f"x.jsonl:{number}")
            if not stray:
                check_labels([sample], TRUE)
                continue
            with pytest.raises(DataError, match=rf"x.jsonl:{number}: got label {label} at token 2, expected -100 or one in \[0, {TRUE}\)"):
                check_labels([sample], TRUE)

    return Case("data boundary", run, tries=rows)
