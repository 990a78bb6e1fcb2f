"""Hinted decoding inside vLLM: a V1 logits processor that mixes pairs of rows, and the worker's methods that report on them.

vLLM loads it in servers that are started for pairs (--logits-processors; rollout/hinted/engine.py), and in no others.  The processor runs before the
temperature: log m of both rows goes on to vLLM's own sampler, which draws the same token for both, since both requests have the same seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from megatron_plugin.data import load_tokenizer
from megatron_plugin.rollout.hinted.pairs import ARGUMENT, TAKEN_PATH, PairMixer, check_arguments
from megatron_plugin.rollout.hinted.vocabulary import TOKENIZER, fingerprint
from megatron_plugin.rollout.vllm_plugin import WorkerExtension

__all__ = ["PairGate", "PairProcessor", "PairWorkerExtension"]

_taken: dict[tuple[str, str], None] = {}  # halves that this process, the API server's, has handed on to the engine's core, oldest first
_forgotten = 0
REMEMBERED = 10_000


class PairProcessor(LogitsProcessor):
    """Requests with extra_args of `pairs.stream_arguments`; all others are left alone."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        if vllm_config.scheduler_config.async_scheduling:  # the newest token is not known yet when the next is drawn
            raise ValueError("hinted decoding: got async scheduling, expected --no-async-scheduling: start the server with paired_options")
        directory = (vllm_config.additional_config or {}).get(TOKENIZER)
        self.tokenizer = load_tokenizer(directory) if directory else None
        self.mixer = PairMixer(self._decode() if self.tokenizer is not None else None)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """In the API server's process, for each request: ValueError becomes HTTP 400.

        vLLM calls it right before it hands the request on to its core, without letting anything else run between (AsyncLLM.add_request), and
        what goes to the core stays in order.  So a request that was seen here is in the core before anything asked of the server later."""
        arguments = (sampling_params.extra_args or {}).get(ARGUMENT)
        if arguments is None:
            return
        check_arguments(arguments)
        s = sampling_params
        if s.n != 1 or s.top_p != 1.0 or s.top_k not in (0, -1) or s.min_p or (s.seed is None and s.temperature > 0):
            raise ValueError(
                "half of a pair: expected n=1, a seed, and no top_p, top_k or min_p of vLLM's own: the nucleus is cut from the mix"
            )
        _take((arguments["pair"], arguments["stream"]))

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.mixer.clear(row)
        for row, params, _, drawn in batch_update.added:
            self.mixer.seat(row, (params.extra_args or {}).get(ARGUMENT), drawn)
        for source, target, direction in batch_update.moved:
            self.mixer.move(source, target, direction == MoveDirectionality.SWAP)

    def apply(self, logits: Tensor) -> Tensor:
        return self.mixer.apply(logits) if self.mixer.rows else logits

    def _decode(self) -> Callable[[Sequence[int]], str]:
        return partial(self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _take(half: tuple[str, str]) -> None:
    global _forgotten
    _taken[half] = None
    if len(_taken) > REMEMBERED:
        del _taken[next(iter(_taken))]
        _forgotten += 1


class PairGate:
    """ASGI middleware of the API server (--middleware): GET TAKEN_PATH tells how many halves it has handed on since it was started."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["path"] != TAKEN_PATH:
            return await self.app(scope, receive, send)
        body = json.dumps({"taken": _forgotten + len(_taken)}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})


class PairWorkerExtension(WorkerExtension):
    """Beside the methods of every engine's worker."""

    def megatron_plugin_pair_limits(self) -> dict[str, Any]:
        """What pairs have to fit into."""
        config = self.vllm_config
        tokenizer = self._pair_processor().tokenizer
        return {
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "policy": config.scheduler_config.policy,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "kv_blocks": self.model_runner.kv_cache_config.num_blocks - 1,  # vLLM keeps one for itself
            "block_size": config.cache_config.block_size,
            "vocabulary": fingerprint(tokenizer) if tokenizer is not None else "",
        }

    def megatron_plugin_pairs_begun(self) -> list[int]:
        """[PairMixer.begun]: a list, since vLLM makes text of a number."""
        return [self._pair_processor().mixer.begun]

    def megatron_plugin_pair_reports(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """PairReport as a dict; forgotten with it."""
        return {key: asdict(report) for key, report in self._pair_processor().mixer.take_reports(keys).items()}

    def _pair_processor(self) -> PairProcessor:
        return next(p for p in self.model_runner.input_batch.logitsprocs.all if isinstance(p, PairProcessor))
