"""A vLLM server that draws pairs: how it is started, and what it is asked beside what every engine is.

engine = start_pair_engine(EngineOptions(model_dir="model", max_num_seqs=64), tokenizer="model")      # STALE: send_weights next
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_plugin.rollout.engine import Completion, EngineError, SamplingParams
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.pairs import TAKEN_PATH, PairReport, stream_arguments
from megatron_plugin.rollout.hinted.vocabulary import TOKENIZER
from megatron_plugin.rollout.vllm_http import VLLMEngine, start_engine
from megatron_plugin.rollout.vllm_process import EngineOptions

__all__ = ["HalfRequest", "PairEngine", "PairLimits", "paired_options", "start_pair_engine"]

PROCESSOR = "megatron_plugin.rollout.vllm_mixing:PairProcessor"
GATE = "megatron_plugin.rollout.vllm_mixing.PairGate"
EXTENSION = "megatron_plugin.rollout.vllm_mixing.PairWorkerExtension"


@dataclass(frozen=True, kw_only=True)
class PairLimits:
    """What pairs have to fit into, as the engine tells it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    """Tokens of prompts, and one for each running request, in one step."""
    policy: str
    chunked_prefill: bool
    kv_blocks: int
    block_size: int
    """Tokens of a block of the key-value cache."""
    vocabulary: str
    """vocabulary.fingerprint of the engine's tokenizer; "": it has none."""


@dataclass(frozen=True, kw_only=True)
class HalfRequest:
    """One stream of a pair."""

    pair: str
    """The same in both halves, and never used again."""
    stream: str
    token_ids: Sequence[int]
    seed: int
    """The same in both halves: with the same distribution it draws the same token."""
    max_tokens: int
    order: int
    """Of pairs in the engine's queue, 1 or more; both halves have the same, so nothing gets between them."""


def paired_options(options: EngineOptions, tokenizer: str | Path) -> EngineOptions:
    """`options` of a server that draws pairs.  tokenizer: its folder, in which the splitter is looked for.

    ValueError for an odd max_num_seqs, which would always tear one pair apart."""
    if options.max_num_seqs < 2 or options.max_num_seqs % 2:
        raise ValueError(f"max_num_seqs={options.max_num_seqs}: expected an even number: a pair is two requests that run at the same time")
    if not (Path(tokenizer) / "tokenizer_config.json").is_file():
        raise ValueError(f"tokenizer={str(tokenizer)!r}: got no tokenizer_config.json there, expected a Hugging Face tokenizer's folder")
    # a step holds a whole pair of prompts however long, beside everything that runs; vLLM's own 2048 would do for speed
    batched = max(2 * options.max_model_len + options.max_num_seqs, 8192)
    extra = (
        "--worker-extension-cls", EXTENSION, "--logits-processors", PROCESSOR,
        "--additional-config", json.dumps({TOKENIZER: str(Path(tokenizer).resolve())}),
        "--middleware", GATE, "--scheduling-policy", "priority", "--no-async-scheduling", "--no-enable-chunked-prefill",
        "--max-num-batched-tokens", str(batched),
    )  # fmt: skip
    # vLLM's second model runner, its default on a GPU, has logits processors of another kind
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0", **options.extra_env}
    return replace(options, extra_args=(*extra, *options.extra_args), extra_env=environment)


def start_pair_engine(options: EngineOptions, tokenizer: str | Path) -> PairEngine:
    """Start a child process for pairs and return it, STALE.  EngineLostError when it does not come up."""
    return start_engine(paired_options(options, tokenizer), PairEngine)


class PairEngine(VLLMEngine):
    """A VLLMEngine whose server was started with `paired_options`.  It must serve nobody else while pairs are drawn."""

    def draw_half(self, request: HalfRequest, options: HintedOptions, *, timeout_s: float) -> Completion:
        """One stream of a pair, to its end.  logprobs are those of the mix: after nucleus and temperature.  EngineError while STALE."""
        version = self.weight_version
        if version is None:
            raise EngineError(f"{self.name}: STALE, it has no complete set of the newest weights: send_weights first")
        sampling = {
            "n": 1, "max_tokens": request.max_tokens, "temperature": options.temperature, "seed": request.seed, "top_p": 1.0, "top_k": 0,
            "stop_token_ids": list(options.end_ids), "ignore_eos": True,  # the plain stream's ends alone
            "logprobs": 0, "detokenize": False, "extra_args": stream_arguments(request.pair, request.stream, options),
        }  # fmt: skip
        body = {"token_ids": list(request.token_ids), "priority": request.order, "sampling_params": sampling}
        answer = self._wire.request("POST", "/inference/v1/generate", timeout_s, json=body).json()
        (choice,) = answer["choices"]
        return self._completion(choice, SamplingParams(max_tokens=request.max_tokens), version)

    def taken(self) -> int:
        """Halves of pairs that are in the engine's core, or were, since the server was started, whoever sent them."""
        return int(self._wire.request("GET", TAKEN_PATH).json()["taken"])

    def begun(self) -> int:
        """Pairs of which a half has been in the engine's batch, since the server was started."""
        return min(found[0] for found in self._wire.call("megatron_plugin_pairs_begun"))

    def pair_limits(self) -> PairLimits:
        """EngineError for a server that was not started for pairs."""
        try:
            found = self._wire.request("POST", "/collective_rpc", json={"method": "megatron_plugin_pair_limits"}).json()["results"][0]
        except EngineError as error:
            raise EngineError(
                f"{self.name}: it was not started for pairs: start_pair_engine does it, or `paired_options` ({error})"
            ) from error
        limits = PairLimits(**{item.name: found[item.name] for item in fields(PairLimits)})
        if limits.policy != "priority" or limits.chunked_prefill or limits.max_num_seqs % 2:
            raise EngineError(
                f"{self.name}: got {limits}, expected policy='priority', no chunked prefill and an even max_num_seqs: see paired_options"
            )
        return limits

    def pair_reports(self, pairs: Sequence[str]) -> dict[str, PairReport]:
        """What the engine says of pairs that are over; it forgets them with it.  Of several workers, the one that says worse."""
        body = {"method": "megatron_plugin_pair_reports", "args": [list(pairs)]}
        workers = self._wire.request("POST", "/collective_rpc", json=body).json()["results"]
        reports: dict[str, PairReport] = {}
        for found in (item for worker in workers for item in worker.items()):
            pair, report = found[0], PairReport(**found[1])
            if pair not in reports or reports[pair].broken is None:
                reports[pair] = report
        return reports
