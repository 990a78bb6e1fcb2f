"""What an answer is worth: a number per sample, and why.

    reward = make_reward({"numeric": 1.0, "format": 0.1}, timeout_s=5, memory_mb=1024)
    results = reward([RewardSample(prompt, completion, reference="... #### 72")])       # [RewardResult(1.1, "right")]
    reward.close()

| name | 1.0 when | runs |
|---|---|---|
| numeric | the number after the first "####" is the reference's (GSM8K) | here |
| math | math-verify finds the two equal: fractions, formulae, sets | in a worker process |
| format | the completion matches a regular expression | in a worker process: a pattern can hang |
| package.module.function | what your function returns for (prompt, completion, reference, finish_reason) | in a worker process |

Every sample gets a result: an answer that hangs, crashes or fills the memory of its worker is worth 0 and counted under its cause.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_plugin.data import extract_answer
from megatron_plugin.rollout.reward_worker import Verdict
from megatron_plugin.rollout.worker_pool import Workers

__all__ = ["ANSWER_LINE", "REWARDS", "Reward", "RewardError", "RewardResult", "RewardSample", "make_reward"]

REWARDS = ("numeric", "math", "format")
ANSWER_LINE = r"(?s).*\n?#### ?[-+]?\$?\d[\d,]*(\.\d+)?\s*"  # GSM8K's: ends with its answer, nothing after it
FIELDS = ("prompt", "completion", "reference", "finish_reason")  # of a RewardSample; keywords of a user's function
FAILURES = 32  # judged in a row without a verdict: the judge or the data is at fault, not the answers


class RewardError(RuntimeError):
    """Rewards mean nothing any more: the judge fails on everything, or returns what is no reward."""

    exit_code = 5


@dataclass(frozen=True)
class RewardSample:
    """One answer to be judged."""

    prompt: str
    completion: str
    reference: str | None = None
    """The data's answer: worked ("... #### 72"), bare, or a formula."""
    finish_reason: str = "stop"


@dataclass(frozen=True)
class RewardResult:
    """reward: finite.  cause: right; wrong, no answer, truncated (no answer, and cut off), empty, format, no reference; scored (by a function
    of yours); timeout, memory, crash, error.  Of a sum it is that of the first part that is not right."""

    reward: float
    cause: str
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of a sum: name -> reward before its weight."""
    detail: str = ""


class Reward(Protocol):
    """Judges answers.  `counts`: causes so far, and what became of worker processes ("worker timeout", "worker memory", ...)."""

    name: str

    def __call__(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        """One result per sample, in order.  RewardError when no verdict can be had."""

    @property
    def counts(self) -> Counter[str]: ...

    def close(self) -> None: ...


def make_reward(
    spec: str | Mapping[str, float], *, timeout_s: float = 5.0, memory_mb: int = 1024, pattern: str = ANSWER_LINE, full_match: bool = True,
    workers: int = 2, network: bool = False,
) -> Reward:  # fmt: skip
    """The reward of a name, a dotted path, or a mapping of these to weights.

    timeout_s, memory_mb (MiB): of one answer, in a worker process; workers: processes per judge.  pattern, full_match: of "format"; without
    full_match it is searched for anywhere.  network: for a function that asks a server.  ValueError for an unknown name, a function that cannot be called, and impossible numbers.
    """
    if isinstance(spec, str):
        return _single(spec, dict(timeout_s=timeout_s, memory_mb=memory_mb, count=workers, network=network), pattern, full_match)
    if not isinstance(spec, Mapping) or not spec:
        raise ValueError(f"reward: got {spec!r}, expected one of {', '.join(REWARDS)}, 'package.module.function', or a mapping of these to weights")
    for name, weight in spec.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"reward '{name}': got the weight {weight!r}, expected a finite number other than 0")
    made: dict[str, tuple[float, Reward]] = {}
    try:
        for name, weight in spec.items():
            made[name] = float(weight), make_reward(
                name, timeout_s=timeout_s, memory_mb=memory_mb, pattern=pattern, full_match=full_match, workers=workers, network=network
            )
    except BaseException:
        for _, reward in made.values():
            reward.close()
        raise
    return _Sum(made)


def _single(name: str, limits: Mapping[str, Any], pattern: str, full_match: bool) -> Reward:
    if name == "numeric":
        return _Numeric()
    tasks: dict[str, dict[str, Any]] = {"math": {"kind": "math"}, "format": {"kind": "format", "pattern": pattern, "full": full_match}}
    if name not in tasks and "." not in name:
        near = difflib.get_close_matches(name.lower(), REWARDS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"unknown reward '{name}'{hint}; expected one of {', '.join(REWARDS)}, or a function of yours as 'package.module.function'")
    return _Judged(name, tasks.get(name, {"kind": "user", "path": name}), limits)


class _Numeric:
    """1.0 when the number after the first "####" is that of the reference, which may be the bare number too."""

    name = "numeric"

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self._failures = _Failures(self.name)

    def __call__(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        results = [_named(sample, self._judge(sample)) for sample in samples]
        self.counts.update(result.cause for result in results)
        self._failures.add(results)
        return results

    def close(self) -> None: ...

    def _judge(self, sample: RewardSample) -> Verdict:
        expected = None if sample.reference is None else _number(sample.reference)
        if expected is None:
            return Verdict(0.0, "no reference", f"no number in {(sample.reference or '')[:80]!r}")
        got = extract_answer(sample.completion)
        if got is None:
            return Verdict(0.0, "no answer")
        return Verdict(1.0, "right") if got == expected else Verdict(0.0, "wrong")


class _Judged:
    """A reward that worker processes compute."""

    def __init__(self, name: str, task: Mapping[str, Any], limits: Mapping[str, Any]):
        self.name, self._needs_reference, self._own = name, task["kind"] == "math", task["kind"] == "user"
        self._causes: Counter[str] = Counter()
        self._failures = _Failures(name)
        self._workers = Workers(task, **limits)
        self._workers.start()  # what cannot be imported is a mistake in the configuration: said now, not after the first rollouts

    def __call__(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        # A group's answers are often the same text, of which a judge of ours says the same each time.
        keys = [i if self._own else (sample.completion, sample.reference) for i, sample in enumerate(samples)]
        by_key = {key: sample for key, sample in zip(keys, samples, strict=True) if sample.reference is not None or not self._needs_reference}
        verdicts: dict[Any, Verdict] = {}
        asked = list(by_key.items())
        for start in range(0, len(asked), FAILURES):
            part = asked[start : start + FAILURES]
            fields = [{name: getattr(sample, name) for name in FIELDS} for _, sample in part]
            verdicts |= dict(zip([key for key, _ in part], self._workers.judge(fields), strict=True))
            self._failures.check_start(list(verdicts.values()))
        missing = Verdict(0.0, "no reference", "the sample has none")
        results = [_named(sample, self._checked(verdicts.get(key, missing))) for key, sample in zip(keys, samples, strict=True)]
        self._causes.update(result.cause for result in results)
        self._failures.add(results)
        return results

    @property
    def counts(self) -> Counter[str]:
        return self._causes + Counter({f"worker {cause}": count for cause, count in self._workers.counts.items()})

    def close(self) -> None:
        self._workers.close()

    def _checked(self, verdict: Verdict) -> Verdict:
        if isinstance(verdict.reward, dict):
            raise RewardError(f"reward '{self.name}' returned {verdict.reward['value']} ({verdict.reward['type']}), expected a finite number")
        if not math.isfinite(verdict.reward):
            raise RewardError(f"reward '{self.name}' returned {verdict.reward}, expected a finite number: one such reward makes a whole group's advantages NaN")
        return verdict


class _Sum:
    """sum of weight x reward."""

    def __init__(self, rewards: Mapping[str, tuple[float, Reward]]):
        self.name = " + ".join(f"{weight:g} {name}" for name, (weight, _) in rewards.items())
        self._rewards = rewards
        self._causes: Counter[str] = Counter()

    def __call__(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        by_name = {name: reward(samples) for name, (_, reward) in self._rewards.items()}
        results = []
        for i in range(len(samples)):
            parts = {name: results_of[i] for name, results_of in by_name.items()}
            worst = next((part for part in parts.values() if part.cause not in ("right", "scored")), next(iter(parts.values())))
            total = sum(self._rewards[name][0] * part.reward for name, part in parts.items())
            results.append(RewardResult(total, worst.cause, {name: part.reward for name, part in parts.items()}, worst.detail))
        self._causes.update(result.cause for result in results)
        return results

    @property
    def counts(self) -> Counter[str]:
        """Of the sum's causes, and of each part under its name."""
        parts = {f"{name}: {cause}": count for name, (_, reward) in self._rewards.items() for cause, count in reward.counts.items()}
        return self._causes + Counter(parts)

    def close(self) -> None:
        for _, reward in self._rewards.values():
            reward.close()


class _Failures:
    """Notices a judge that judges nothing: its zeros look like wrong answers, and training would go on with them."""

    NONE = ("error", "timeout", "memory", "crash", "no reference")

    def __init__(self, name: str):
        self.name, self.in_a_row, self.verdicts = name, 0, 0

    def add(self, results: Sequence[RewardResult | Verdict]) -> None:
        """RewardError when all of `results`, a call's, failed, and either none ever succeeded or 32 have failed in a row."""
        for result in results:
            failed = result.cause in self.NONE
            self.in_a_row = self.in_a_row + 1 if failed else 0
            self.verdicts += not failed
        if results and self.in_a_row >= len(results) and (self.verdicts == 0 or self.in_a_row >= FAILURES):
            self._stop(self.in_a_row, results)

    def check_start(self, verdicts: Sequence[Verdict]) -> None:
        """The same in the midst of a first call: of 4 000 answers that all hang, the first 32 are enough."""
        if self.verdicts == 0 and len(verdicts) >= FAILURES and all(verdict.cause in self.NONE for verdict in verdicts):
            self._stop(len(verdicts), verdicts)

    def _stop(self, count: int, results: Sequence[RewardResult | Verdict]) -> None:
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(result.cause for result in results).items())
        last = results[-1].detail or results[-1].cause
        raise RewardError(f"reward '{self.name}' judged none of the last {count} answers ({causes}): rewards of 0 would be noise; the last one: {last}")


def _named(sample: RewardSample, verdict: Verdict) -> RewardResult:
    """The verdict, with why there is no answer."""
    cause = verdict.cause
    if cause in ("no answer", "format") and not sample.completion.strip():
        cause = "empty"
    elif cause in ("no answer", "format") and sample.finish_reason == "length":
        cause = "truncated"
    return RewardResult(float(verdict.reward), cause, detail=verdict.detail)


def _number(reference: str) -> str | None:
    """What the reference answers: after its "####", or all of it when it is a bare number."""
    bare = re.fullmatch(r"[-+]?\$?(\d[\d,]*(\.\d+)?|\.\d+)", reference.strip())
    return extract_answer(f"#### {reference.strip()}" if bare else reference)
