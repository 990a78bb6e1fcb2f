"""An engine for pairs without vLLM: the real PairMixer over a toy model, a batch that steps in a thread, and faults where a test wants them."""

import itertools
import threading
import time

import torch

from megatron_plugin.rollout.engine import Completion, EngineError, Health
from megatron_plugin.rollout.hinted.engine import PairLimits
from megatron_plugin.rollout.hinted.pairs import ARGUMENT, PairMixer, stream_arguments
from megatron_plugin.rollout.hinted.vocabulary import fingerprint


class _Running:
    def __init__(self, request, options, number):
        self.request, self.options, self.number = request, options, number
        self.tokens, self.logprobs, self.row, self.seated = [], [], None, False
        self.generator = torch.Generator().manual_seed(request.seed)
        self.answer, self.done = None, threading.Event()


class ToyPairEngine:
    """fault(step, running) -> those that are left out of this step: as vLLM does it to a request that it pushed out of the cache."""

    name, max_model_len = "toy", 200

    def __init__(self, tokenizer, *, width=300, seqs=16, batched=10_000, kv_blocks=1000, fault=None, gap_s=1e-4):
        self.gap_s, self.vocab_size, self.fault, self.tokenizer = gap_s, width, fault or (lambda step, running: ()), tokenizer
        self.limits = PairLimits(max_num_seqs=seqs, max_num_batched_tokens=batched, policy="priority", chunked_prefill=False, kv_blocks=kv_blocks,
                                 block_size=16, vocabulary=fingerprint(tokenizer))  # fmt: skip
        self.mixer = PairMixer(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False))
        self.changed, self.waiting, self.running = threading.Condition(), [], []
        self.paused, self.closed, self.number, self.step_count, self.step_tokens = 0, False, itertools.count(), 0, []
        self.handed_on = self.others = self.intruders = 0
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    # -- what HintedDecoder asks of an engine -----------------------------------------------------------------------------------------------------

    def pair_limits(self):
        return self.limits

    def pause(self):
        with self.changed:
            self.paused += 1

    def resume(self):
        with self.changed:
            self.paused -= 1
            self.changed.notify_all()

    def taken(self):
        with self.changed:
            self.others += self.intruders  # requests of somebody else
            return self.handed_on + self.others

    def health(self):
        return Health.HEALTHY

    def begun(self):
        with self.changed:
            return self.mixer.begun

    def pair_reports(self, pairs):
        with self.changed:
            return self.mixer.take_reports(pairs)

    def draw_half(self, request, options, *, timeout_s):
        if request.max_tokens < 1:
            raise EngineError("max_tokens must be at least 1")
        running = _Running(request, options, next(self.number))
        with self.changed:
            self.waiting.append(running)
            self.handed_on += 1
            self.changed.notify_all()
        running.done.wait(timeout_s)
        return running.answer

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    # -- the batch --------------------------------------------------------------------------------------------------------------------------------

    def _loop(self):
        while True:
            with self.changed:
                if self.closed:
                    return
                if self.paused or not (self.waiting or self.running):
                    self.changed.wait()
                else:
                    self._step()
            time.sleep(self.gap_s)  # the others' turn, or all answers are drawn before anybody can pause

    def _step(self):
        self.waiting.sort(key=lambda r: (r.request.order, r.number))
        before = len(self.running)
        while self.waiting and len(self.running) < self.limits.max_num_seqs:
            new = self.waiting.pop(0)
            new.row = min(set(range(self.limits.max_num_seqs)) - {r.row for r in self.running})
            self.running.append(new)
        self.step_tokens.append(sum(len(r.request.token_ids) for r in self.running[before:]) + before)
        out = set(self.fault(self.step_count, self.running))
        self.step_count += 1
        active = [r for r in self.running if r not in out]
        for r in out:
            self.mixer.clear(r.row)
            r.seated = False
        for r in active:
            if not r.seated:
                self.mixer.seat(r.row, stream_arguments(r.request.pair, r.request.stream, r.options)[ARGUMENT], r.tokens)
                r.seated = True
        logits = torch.zeros(self.limits.max_num_seqs, self.vocab_size)
        for r in active:
            logits[r.row] = toy_logits([*r.request.token_ids, *r.tokens], self.vocab_size)
        if active:
            self.mixer.apply(logits)
        for r in active:
            self._sample(r, logits[r.row])

    def _sample(self, r, logits_V):
        logp_V = (logits_V / (r.options.temperature or 1.0)).log_softmax(-1)
        race_V = logp_V.exp() / torch.empty_like(logp_V).exponential_(generator=r.generator)
        token = int((race_V if r.options.temperature else logp_V).argmax())
        r.tokens.append(token)
        r.logprobs.append(logp_V[token].item())
        if token in r.options.end_ids or len(r.tokens) == r.request.max_tokens:
            r.answer = Completion(tuple(r.tokens), tuple(r.logprobs), "stop" if token in r.options.end_ids else "length", 1)
            self.running.remove(r)
            self.mixer.clear(r.row)
            r.done.set()


def toy_logits(ids, width):
    """A model that looks at all tokens before: the same ids give the same logits."""
    seed = 0
    for token in ids:
        seed = (seed * 1_000_003 + token + 1) % (2**61 - 1)
    return 3 * torch.randn(width, generator=torch.Generator().manual_seed(seed))
