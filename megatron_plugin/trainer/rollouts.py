"""Rollout batches: prompts to the engines, answers to the judge, groups to the step.  Every rank calls these functions together.

In rounds: each leader asks its engines; when requests are missing because engines were lost, they are restarted, all ranks together send them
the weights, and the next round asks for what is missing.  So no prompt is lost or trained on twice, and no completion is drawn with mixed
weights; with max_staleness=1 those asked for again have newer weights than the rest of their batch.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_plugin.data import DataError, Prompt, PromptSet, RowOrder, encode_prompts
from megatron_plugin.rollout.engine import Completion, SamplingParams
from megatron_plugin.rollout.fleet import Fleet, Generated, Request
from megatron_plugin.rollout.log import RolloutLine, RolloutLog, cut_rollouts
from megatron_plugin.trainer import signals
from megatron_plugin.trainer.batch import Group, Judged
from megatron_plugin.trainer.datasets import EvalSet
from megatron_plugin.trainer.engines import Engines
from megatron_plugin.trainer.judge import Judge
from megatron_plugin.trainer.leaders import Leaders
from megatron_plugin.trainer.run import Run

__all__ = ["Rollouts"]

log = logging.getLogger("megatron_plugin")
COUNTED = ("retried", "late", "suspected", "lost_engines", "refused", "answered", "behind")

Asked = dict[int, list[tuple[Prompt, Request]]]
"""By replica: what its samples come from, in order."""


class Rollouts:
    """The on-policy source of samples."""

    def __init__(self, run: Run, leaders: Leaders):
        self.run, self.config, self.leaders = run, run.config.rollout, leaders
        self.prompts = run.data.prompts
        self.order = RowOrder(len(self.prompts), self.config.prompts, run.config.seed, fingerprint=self.prompts.fingerprint())
        self.held_out = {held_out.name: self._held_out(held_out) for held_out in run.data.evals}
        self.judge = Judge(run, leaders)
        self.engines = Engines(run, leaders)
        self.log = leaders.on_leaders(self._open_log)
        self.unlogged = 0
        """Batches of this leader that its log refused, since the start."""
        self._ahead: _Ahead | None = None
        self._position = self.order.state_dict()

    def _open_log(self) -> RolloutLog:
        folder, index = Path(self.run.config.run_dir), self.leaders.index
        if index == 0:  # also the files of leaders that this run has no longer
            cut_rollouts(folder, resumed_at=self.run.step, first=self.leaders.count)
        return RolloutLog(folder / ("rollouts.jsonl" if index == 0 else f"rollouts.{index}.jsonl"), resumed_at=self.run.step)

    def _record(self, lines: Iterable[RolloutLine]) -> None:
        """A disk that refuses them is no reason to stop."""
        try:
            self.log.add(lines)
        except OSError as error:
            if not self.unlogged:
                log.warning("%s cannot be written, training goes on and log/rollouts_failed counts its batches: %s", self.log.path, error)
            self.unlogged += 1

    def _held_out(self, held_out: EvalSet) -> PromptSet:
        try:
            return encode_prompts(held_out.conversations, self.run.data.tokenizer, longest=self.longest)
        except DataError as error:
            raise DataError(f"held-out set {held_out.name}: {error}") from error

    def report(self) -> list[str]:
        """For the terminal."""
        config = self.config
        held_out = [f"held out, {name}: {prompts}, which count as answered for nothing" for name, prompts in self.held_out.items() if prompts.too_long]
        return [*self.engines.report(), *held_out, f"{self.prompts}; {config.prompts} a batch, {config.n} completions each, reward {config.reward}"]

    def batch(self) -> tuple[list[Group], dict[str, float]]:
        """The next rollout batch: this replica's groups, and metrics of all replicas' groups."""
        begin, self.engines.sync.seconds, self.judge.seconds = time.perf_counter(), 0.0, 0.0
        judged, counted = self._judged_batch()
        left_out: list[Judged] = []
        for _ in range(self.config.dynamic_sampling):
            if not any(self.leaders.everyone(self.judge.short_of(judged))):
                break
            more, again = self._judged_batch()
            judged, without = self.judge.informative_first(judged, more)
            left_out += without
            counted.update(again)
        self.engines.rest()
        groups, metrics = self.judge.groups(judged)
        self.leaders.on_leaders(lambda: self._record(self.judge.lines(groups, left_out, step=self.run.step + 1)))
        mine = self.leaders.from_leader(groups)[self.leaders.replica]
        self._position = self._ahead.position if self._ahead else self.order.state_dict()
        metrics |= {"rollout/staleness": counted.pop("behind") / max(1, counted.pop("answered"))}
        metrics |= {f"rollout/{name}": float(count) for name, count in counted.items()}
        state = self.leaders.added(Counter(healthy=self.engines.healthy(), unlogged=self.unlogged))
        metrics |= {"rollout/engines_healthy": float(state["healthy"])} | ({"log/rollouts_failed": float(state["unlogged"])} if state["unlogged"] else {})
        sync, judge = self.engines.sync.seconds, self.judge.seconds
        return mine, metrics | {"perf/sync_s": sync, "perf/judge_s": judge, "perf/generate_s": time.perf_counter() - begin - sync - judge}

    def evaluate(self) -> dict[str, float]:
        """eval/<set>_reward_greedy and _reward_sampled (rollout.eval_n completions a prompt) of every held-out set, with the newest weights.

        A prompt that is too long or that the engines refuse counts as answered for nothing."""
        if self._ahead is not None:
            self.leaders.on_leaders(signals.breakable(self._ahead.finished))
        self.engines.refresh(self.run.step)
        metrics = {}
        for held_out in self.run.data.evals:
            prompts = self.held_out[held_out.name]
            mine = prompts.prompts[self.leaders.index :: self.leaders.count]
            for name, n, temperature in (("greedy", 1, 0.0), ("sampled", self.config.eval_n, self.config.temperature)):
                if n:
                    params = [self._params(n, temperature, f"eval {i}") for i in range(len(mine))]
                    asked = {0: [(prompt, Request(i, prompt.token_ids, params[i])) for i, prompt in enumerate(mine)]}
                    judged, counted = self._complete(asked, None)
                    unanswered = n * (counted["refused"] + len(prompts.too_long))
                    metrics[f"eval/{held_out.name}_reward_{name}"] = self.judge.mean_reward(judged, unanswered)
        self.engines.rest()
        return metrics

    @property
    def leads(self) -> bool:
        return self.leaders.leads

    @property
    def longest(self) -> int:
        """Tokens of a prompt that leaves room for a whole completion."""
        return self.run.config.data.seq_length - self.config.max_tokens

    def position(self) -> dict[str, Any]:
        """Of the prompts, after the batches handed out: what is sampled ahead is not in it."""
        return self._position

    def resume(self, position: dict[str, Any]) -> None:
        self.order.load_state_dict(position)
        self._position = position

    def close(self) -> None:
        """End the engines that are ours, the judge's processes, the log."""
        self.engines.close()
        self.judge.close()
        if self.log is not None:
            self.log.close()

    def _judged_batch(self) -> tuple[dict[int, list[Judged]], Counter[str]]:
        """(judged completions by replica, on leaders; counts over all leaders) of the next prompts in order."""
        if self.config.max_staleness == 0:
            self.engines.refresh(self.run.step)
            return self._complete(self._next_requests(), None)
        now = self._ahead or self._begin_ahead()
        self.leaders.on_leaders(signals.breakable(now.finished))  # nothing is in flight while weights change, also those that bring a lost engine back: no completion is of two versions
        done = self._complete(now.asked, now.result, behind=self.run.step - now.step)
        self._ahead = None
        if not self._pauses():
            self._begin_ahead()
        return done

    def _pauses(self) -> bool:
        """Whether a checkpoint or the end comes before the next batch; nothing is sampled ahead then.  What follows a checkpoint is drawn with its
        weights, by the run that goes on as by the one that resumes, so that both train on the same samples; behind the end nobody would."""
        config, step, after = self.run.config, self.run.step, self.run.step + self.config.updates
        intervals = (config.checkpoint.interval, config.train.eval_interval if config.checkpoint.best else 0)
        return after >= config.train.steps or any(n and after // n > step // n for n in intervals)

    def _begin_ahead(self) -> _Ahead:
        """Send the newest weights and let the next batch be sampled with them while the trainer goes on."""
        self.engines.refresh(self.run.step)
        position = self.order.state_dict()
        self._ahead = _Ahead(self._next_requests(), position, self.run.step, self.engines.fleet)
        return self._ahead

    def _next_requests(self) -> Asked:
        indices, replicas, step = self.order.next_step(), self.leaders.replicas, self.order.consumed
        share = len(indices) // replicas
        asked: Asked = {}
        for replica in self.leaders.served():
            for place in range(replica * share, (replica + 1) * share):
                prompt = self.prompts.prompts[indices[place]]
                params = self._params(self.config.n, self.config.temperature, f"{step} {place}")
                asked.setdefault(replica, []).append((prompt, Request((step, place), prompt.token_ids, params)))
        return asked

    def _params(self, n: int, temperature: float, name: str) -> SamplingParams:
        seed = zlib.crc32(f"megatron-plugin rollouts {self.run.config.seed} {name}".encode()) >> 1
        cut = dict(top_p=self.config.top_p, top_k=self.config.top_k) if temperature else {}
        return SamplingParams(
            n=n, max_tokens=self.config.max_tokens, temperature=temperature, seed=seed if self.config.seed_samples and temperature else None,
            stop_token_ids=self.engines.stop_token_ids, vocab_size=self.run.data.vocab_size, **cut,
        )  # fmt: skip

    def _complete(self, asked: Asked, first: Callable[[], Generated] | None, *, behind: int = 0) -> tuple[dict[int, list[Judged]], Counter[str]]:
        """Every request completed or refused, and judged, on leaders; counts over all leaders, the same on every rank.

        first: where the first round is under way already, with weights of `behind` optimizer steps ago."""
        fleet = self.engines.fleet
        wanted = [request for part in asked.values() for _, request in part] if self.leads else []
        completions: dict[Any, list[Completion]] = {}
        counted: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        while True:
            generated = self.leaders.on_leaders(signals.breakable(first or functools.partial(Fleet.generate, fleet, wanted))) or Generated()
            first = None
            completions |= generated.completions
            counted.update(
                retried=generated.retried, late=generated.late, suspected=generated.suspected, lost_engines=len(generated.lost), refused=len(generated.refused),
                answered=len(generated.completions), behind=behind * len(generated.completions),
            )  # fmt: skip
            behind = 0
            _say(generated)
            wanted = [request for request in wanted if request.key in generated.missing]
            if not any(self.leaders.everyone(len(wanted))):
                break
            self.engines.recover()
        found = {r: [(p, completions[q.key]) for p, q in part if q.key in completions] for r, part in asked.items()} if self.leads else {}
        judged = self.leaders.on_leaders(signals.breakable(lambda: {replica: self.judge.judge(part) for replica, part in found.items()})) or {}
        return judged, self.leaders.added(counted)


def _say(generated: Generated) -> None:
    """Why prompts were refused: a count alone would help nobody.  Engines: rollout/slots.py says it when it happens."""
    if generated.refused:
        key, cause = next(iter(generated.refused.items()))
        log.warning("%d prompts refused, the first, (step, place) %s: %s", len(generated.refused), key, cause)


class _Ahead:
    """A rollout batch that is being sampled in a thread of the leader."""

    def __init__(self, asked: Asked, position: dict[str, Any], step: int, fleet: Fleet | None):
        self.asked, self.position, self.step = asked, position, step
        self._result: Generated | BaseException | None = None
        self._thread: threading.Thread | None = None
        if fleet is not None:
            self._thread = threading.Thread(target=self._run, args=(fleet,), name="rollouts ahead", daemon=True)
            self._thread.start()

    def _run(self, fleet: Fleet) -> None:
        try:
            self._result = fleet.generate([request for part in self.asked.values() for _, request in part])
        except BaseException as error:  # raised where the result is asked for
            self._result = error

    def finished(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def result(self) -> Generated:
        self.finished()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result
