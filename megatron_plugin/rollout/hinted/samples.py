"""What goes into hinted decoding and what comes out, and whether two answers are those of one pair in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_plugin.rollout.engine import Completion
from megatron_plugin.rollout.hinted.pairs import PairReport
from megatron_plugin.rollout.hinted.stops import EndReason

__all__ = ["HintedPrompt", "HintedRun", "HintedSample", "out_of_step"]


@dataclass(frozen=True)
class HintedPrompt:
    """The same question twice."""

    key: str
    plain_ids: Sequence[int]
    """The question alone."""
    hinted_ids: Sequence[int]
    """The question with its answer or an analysis of it."""


@dataclass(frozen=True)
class HintedSample:
    """An answer that both streams drew in step."""

    key: str
    token_ids: tuple[int, ...]
    """With the end token when end_reason is EOS."""
    text: str
    """Without special tokens."""
    logp: tuple[float, ...]
    """Nats, one per token, of the distribution it was drawn from: the mix after nucleus and temperature (temperature 0: the nucleus as it is)."""
    end_reason: EndReason
    split_at: int | None
    """Tokens before the plain stream was left alone; None: the splitter never came."""
    attempts: int
    weight_version: int


@dataclass
class HintedRun:
    """What became of the prompts: each key is in exactly one of the first two."""

    samples: dict[str, HintedSample] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    """Causes."""
    counts: Counter[str] = field(default_factory=Counter)
    """unpaired steps; desynchronised (attempts), of which undetected by the engine; retried; discarded; unfit (prompts never asked);
    no splitter; cut character (the text ends within one)."""
    torn: list[str] = field(default_factory=list)
    """Of each attempt that fell out of step: key, attempt, cause."""
    tokens: int = 0
    """Of samples."""
    seconds: float = 0.0

    def __str__(self) -> str:
        ends = Counter(sample.end_reason.value for sample in self.samples.values())
        facts = {**dict(sorted(ends.items())), **dict(sorted(self.counts.items()))}
        return (
            f"{len(self.samples)} hinted answers, {len(self.rejected)} rejected, {self.tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens / max(self.seconds, 1e-9):.0f}/s); " + ", ".join(f"{name} {count}" for name, count in facts.items())
        )


def out_of_step(hinted: Completion, plain: Completion, report: PairReport | None) -> str | None:
    """Why two answers are not those of a pair in step, by the engine's word and by both answers themselves; None: they are."""
    if report is None:
        return "the engine knows nothing of the pair"
    if report.broken is not None:
        return report.broken
    if hinted.token_ids != plain.token_ids or hinted.finish_reason != plain.finish_reason:
        same = next((i for i, both in enumerate(zip(hinted.token_ids, plain.token_ids)) if both[0] != both[1]), "the end")  # noqa: B905
        return f"its streams differ from token {same} on, {len(hinted.token_ids)} and {len(plain.token_ids)} long"
    if hinted.weight_version != plain.weight_version:
        return f"its streams have weights {hinted.weight_version} and {plain.weight_version}"
    expected = report.drawn + (report.ended is not None)
    if report.unpaired or len(plain.token_ids) != expected:
        return f"got {len(plain.token_ids)} tokens, expected {expected}, and {report.unpaired} steps of one stream alone"
    if report.ended is None and hinted.logprobs != plain.logprobs:
        return "its streams drew the same tokens from different distributions"
    return None
