"""Hinted decoding of many prompts at once: pairs of requests to one vLLM engine, kept in step, checked, and drawn again when they fell out of it.

    decoder = HintedDecoder(engine, options, tokenizer)
    run = decoder.run([HintedPrompt("gsm8k:17", plain_ids, hinted_ids), ...])
    run.samples["gsm8k:17"].text; run.rejected; print(run)

In step: pairs are handed in while the engine is paused, so that both halves are taken up in the same step; the engine watches each pair
(pairs.py), and its word is compared with both answers here.  A pair that fell out of step, as when the key-value cache overflows, is drawn
again with the same seed and fewer others beside it, in the end alone, where nothing can push it out.  So an answer depends on its key and the
seed, and on the others no more than rounding does.
"""

from __future__ import annotations

import hashlib
import queue
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_plugin.rollout.engine import Completion, EngineError, EngineLostError
from megatron_plugin.rollout.hinted.engine import HalfRequest, PairEngine
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.pairs import STREAMS, PairReport
from megatron_plugin.rollout.hinted.samples import HintedPrompt, HintedRun, HintedSample, out_of_step
from megatron_plugin.rollout.hinted.stops import REPLACEMENT, EndReason
from megatron_plugin.rollout.hinted.vocabulary import fingerprint

__all__ = ["HintedDecoder", "HintedPrompt", "HintedRun", "HintedSample"]

FEWER = 4  # each attempt draws so many times fewer pairs at once than the one before
SETTLE_S = 60.0  # for requests to reach the engine; it takes milliseconds
REPORTS = 32  # pairs asked for at a time


@dataclass(eq=False)
class _Flight:
    prompt: HintedPrompt
    pair: str
    halves: dict[str, Completion | BaseException] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    """Of halves that were refused, or lost."""


class HintedDecoder:
    """One engine's pairs.  `run` may be called again, not from two threads at once."""

    def __init__(self, engine: PairEngine, options: HintedOptions, tokenizer, *, timeout_s: float = 3600.0, attempts: int = 3):
        """timeout_s: of one answer, with its wait in the engine.  attempts: draws of one pair, 1 or more.

        ValueError when the engine's tokenizer or vocabulary is another one; EngineError when it was not started for pairs."""
        if attempts < 1:
            raise ValueError(f"attempts: got {attempts}, expected 1 or more")
        self.engine, self.options, self.tokenizer = engine, options, tokenizer
        self.timeout_s, self.attempts = timeout_s, attempts
        self.limits = engine.pair_limits()
        if options.vocab_size > engine.vocab_size:
            raise ValueError(f"vocab_size: got {options.vocab_size}, expected at most {engine.vocab_size}, the columns of the served model")
        if options.splitter and self.limits.vocabulary != (own := fingerprint(tokenizer)):
            raise ValueError(
                f"got a tokenizer ({own}) that is not the engine's ({self.limits.vocabulary or 'none'}): the splitter would be looked for in another text"
            )
        self._answers: queue.SimpleQueue[tuple[_Flight, str, Completion | BaseException]]
        self._newest: tuple[Sequence[_Flight], int] = ((), 0)
        """The pairs handed in last, and how many pairs the engine had begun before."""
        self._order = 0
        """Of the pair handed in last.  It only goes up: when the engine has to push somebody out, it is the youngest."""

    def run(self, prompts: Sequence[HintedPrompt]) -> HintedRun:
        """All answers.  EngineLostError when the engine is gone, EngineError when it serves others, too.  ValueError for a key that comes twice."""
        if twice := [key for key, count in Counter(prompt.key for prompt in prompts).items() if count > 1]:
            raise ValueError(f"got the key {twice[0]!r} twice, expected a key of its own for each")
        begin, result, waiting = time.monotonic(), HintedRun(), []
        self._newest = ((), 0)
        self._answers = queue.SimpleQueue()  # a new one: threads of a run that ended with an error may still answer
        for prompt in prompts:
            if cause := self._unfit(prompt):
                result.rejected[prompt.key] = cause
                result.counts["unfit"] += 1
            else:
                waiting.append(prompt)
        for attempt in range(1, self.attempts + 1):
            alone = attempt > 1 and attempt == self.attempts
            limit = 1 if alone else max(1, self.limits.max_num_seqs // 2 // FEWER ** (attempt - 1))
            torn = self._draw(waiting, limit, attempt, result)
            waiting = [prompt for prompt in waiting if prompt.key in torn]
            if attempt < self.attempts:
                result.counts["retried"] += len(waiting)
        for prompt in waiting:
            result.counts["discarded"] += 1
            result.rejected[prompt.key] = f"its streams fell out of step in each of {self.attempts} attempts; the last: {torn[prompt.key]}"
        result.seconds = time.monotonic() - begin
        return result

    # -- one attempt ------------------------------------------------------------------------------------------------------------------------------

    def _draw(self, prompts: Sequence[HintedPrompt], limit: int, attempt: int, result: HintedRun) -> dict[str, str]:
        """Draw all prompts, at most `limit` pairs at once.  Key -> cause, of pairs that fell out of step."""
        waiting, over = deque(prompts), []
        running: set[_Flight] = set()
        torn: dict[str, str] = {}
        while waiting or running:
            # again and again: what one step takes may be fewer than there is room for
            while waiting and (not running or limit - len(running) >= min(max(1, limit // 4), len(waiting))):
                if not self._hand_in(waiting, limit - len(running), running):
                    break
            flight, stream, answer = self._wait()
            flight.halves[stream] = answer
            if len(flight.halves) == 2:
                running.discard(flight)
                over.append(flight)
            if len(over) >= REPORTS or (over and not running):
                torn |= self._judge(over, attempt, result)
                over = []
        return torn

    def _hand_in(self, waiting: deque[HintedPrompt], room: int, running: set[_Flight]) -> bool:
        """Pairs that fit into one step together, while nothing is stepping; they are running then.  False: none fits beside those that run."""
        budget = self.limits.max_num_batched_tokens - 2 * len(running)
        chosen: list[HintedPrompt] = []
        while waiting and len(chosen) < room:
            budget -= len(waiting[0].plain_ids) + len(waiting[0].hinted_ids)
            if budget < 0 and (chosen or running):
                break
            chosen.append(waiting.popleft())
        if not chosen:
            return False
        self._until_begun()
        flights = [_Flight(prompt, secrets.token_hex(8)) for prompt in chosen]
        running.update(flights)
        self.engine.pause()
        try:
            before = self.engine.taken()
            self._newest = flights, self.engine.begun()
            for flight in flights:
                self._order += 1
                for stream in STREAMS:
                    threading.Thread(
                        target=self._ask, args=(flight, stream, self._order, self._answers), name="hinted decoding", daemon=True
                    ).start()
            self._until_taken(flights, before)
        finally:
            self.engine.resume()
        return True

    def _until_begun(self) -> None:
        """Until the engine has begun what it was handed last: the budget of one step is not for two lots."""
        flights, before = self._newest
        deadline = time.monotonic() + self.timeout_s
        while self.engine.begun() - before < sum(len(flight.errors) < 2 for flight in flights):
            if time.monotonic() > deadline:
                raise EngineLostError(f"{self.engine.name}: it has not begun all of {len(flights)} pairs within {self.timeout_s:g} s")
            time.sleep(0.005)

    def _until_taken(self, flights: Sequence[_Flight], before: int) -> None:
        """Until every half is in the engine's core, which takes up none while it is paused, or refused."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            refused = sum(len(flight.errors) for flight in flights)
            taken = self.engine.taken() - before
            if taken + refused >= 2 * len(flights):
                break
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.engine.name}: got {taken} requests in the engine after {SETTLE_S:g} s, expected {2 * len(flights)}"
                )
            time.sleep(0.002)
        if taken > 2 * len(flights):
            raise EngineError(
                f"{self.engine.name}: got {taken} requests for pairs, expected our own {2 * len(flights)}: somebody else uses it, too; pairs need an "
                "engine of their own"
            )

    def _ask(self, flight: _Flight, stream: str, order: int, answers: queue.SimpleQueue) -> None:
        """In a thread of its own."""
        prompt = flight.prompt
        longest = max(len(prompt.plain_ids), len(prompt.hinted_ids))
        request = HalfRequest(
            pair=flight.pair, stream=stream, token_ids=prompt.hinted_ids if stream == "hinted" else prompt.plain_ids, order=order,
            seed=_seed(self.options.seed, prompt.key), max_tokens=min(self.options.max_tokens, self.engine.max_model_len - longest),
        )  # fmt: skip
        try:
            answer: Completion | BaseException = self.engine.draw_half(request, self.options, timeout_s=self.timeout_s)
        except BaseException as error:
            answer = error
            flight.errors.append(error)
        answers.put((flight, stream, answer))

    def _wait(self) -> tuple[_Flight, str, Completion | BaseException]:
        flight, stream, answer = self._answers.get()
        if isinstance(answer, EngineLostError) or (isinstance(answer, BaseException) and not isinstance(answer, EngineError)):
            raise answer
        return flight, stream, answer

    # -- what came of it --------------------------------------------------------------------------------------------------------------------------

    def _judge(self, flights: Sequence[_Flight], attempt: int, result: HintedRun) -> dict[str, str]:
        reports = self.engine.pair_reports([flight.pair for flight in flights])
        torn = {}
        for flight in flights:
            report, key = reports.get(flight.pair), flight.prompt.key
            if flight.errors:
                result.rejected[key] = str(flight.errors[0])
                result.counts["refused"] += 1
                continue
            cause = out_of_step(flight.halves["hinted"], flight.halves["plain"], report)
            if cause is not None:
                torn[key] = cause
                result.torn.append(f"{key}, attempt {attempt}: {cause}")
                result.counts["desynchronised"] += 1
                result.counts["undetected by the engine"] += report is None or report.broken is None
                result.counts["unpaired steps"] += report.unpaired if report else 0
                continue
            self._keep(flight, report, attempt, result)
        return torn

    def _keep(self, flight: _Flight, report: PairReport, attempt: int, result: HintedRun) -> None:
        half = flight.halves["plain"]
        token_ids = half.token_ids[: report.drawn]
        if report.ended is not None:
            reason = EndReason(report.ended)
        else:
            reason = EndReason.EOS if half.finish_reason == "stop" else EndReason.LENGTH
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sample = HintedSample(
            flight.prompt.key, token_ids, text, half.logprobs[: report.drawn], reason, report.split_at, attempt, half.weight_version
        )
        result.samples[sample.key] = sample
        result.tokens += len(token_ids)
        result.counts["no splitter"] += bool(self.options.splitter) and report.split_at is None
        result.counts["cut character"] += text.endswith(REPLACEMENT)

    def _unfit(self, prompt: HintedPrompt) -> str | None:
        """Why it cannot be asked; None: it can."""
        for name, ids in (("plain", prompt.plain_ids), ("hinted", prompt.hinted_ids)):
            if not 0 < len(ids) < self.engine.max_model_len:
                return (
                    f"its {name} prompt has {len(ids)} tokens, expected 1 to {self.engine.max_model_len - 1}: the context holds "
                    f"{self.engine.max_model_len}, prompt and answer together"
                )
            if stray := [token for token in ids if not 0 <= token < self.engine.vocab_size]:
                return f"its {name} prompt has the token {stray[0]}, expected ids in [0, {self.engine.vocab_size}): another tokenizer's?"
        longest = max(len(prompt.plain_ids), len(prompt.hinted_ids))
        room = min(self.options.max_tokens, self.engine.max_model_len - longest)
        need = sum(-(-(len(ids) + room) // self.limits.block_size) for ids in (prompt.plain_ids, prompt.hinted_ids))
        if need > self.limits.kv_blocks:
            return f"its pair needs {need} blocks of key-value cache, expected at most {self.limits.kv_blocks}: give the engine more, or lower max_tokens"
        return None


def _seed(seed: int, key: str) -> int:
    """Of a pair: the same whenever and with whatever others it is drawn.  Below 2^63, as vLLM needs it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=7).digest(), "big")
