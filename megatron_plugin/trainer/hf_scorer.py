"""Log-probabilities and entropies of samples under a Hugging Face directory, by transformers' own forward: any causal model, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_plugin.config import ConfigError
from megatron_plugin.data import IGNORE_INDEX, Sample
from megatron_plugin.ops import token_stats
from megatron_plugin.rollout.vllm_model import context_length
from megatron_plugin.trainer.memory import OutOfMemoryError, is_out_of_memory

__all__ = ["HFScorer"]

TOKENS = 8192
"""Of one forward pass, with the padding, where a sample alone is not longer: their logits are [TOKENS, V]."""


class HFScorer:
    """The model of a directory, in its own dtype, on the GPU where there is one."""

    def __init__(self, model: Path, *, vocab_size: int, rows: int = 8):
        """vocab_size: the tokenizer's; columns beyond it count as -inf.  rows: of one forward pass.  ConfigError for what transformers cannot load."""
        from transformers import AutoModelForCausalLM

        try:
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"transformers cannot load {model}: {error}") from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.vocab_size, self.rows = loaded.eval().to(self.device), vocab_size, rows
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        self.longest = context_length(loaded.config.to_dict())
        """Tokens of a sample that can be scored."""

    def __call__(self, samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor]]:
        """(log p, entropy) of each, fp32 [T] on the CPU at the tokens' own places, nats; 0 where a token is not trained."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].tokens_T))  # alike in length: little padding
        while order:
            longest = len(samples[order[-1]].tokens_T)
            places = order[-max(1, min(self.rows, TOKENS // longest)) :]
            del order[-len(places) :]
            found |= zip(places, self._explained([samples[i] for i in places]), strict=True)
        return [found[i] for i in range(len(samples))]

    def _explained(self, samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor]]:
        try:
            return self._forward(samples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            longest = max(len(sample.tokens_T) for sample in samples)
            raise OutOfMemoryError(f"out of memory with {len(samples)} rows of up to {longest} tokens, {samples[0].source} among them: score with fewer --rows "
                                   f"(realign: --no-score, and score its file), or a run directory under torchrun; torch: {str(error)[:200]}") from error  # fmt: skip

    @torch.inference_mode()
    def _forward(self, samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor]]:
        lengths = [len(sample.tokens_T) for sample in samples]
        ids_NT = torch.zeros(len(samples), max(lengths), dtype=torch.int64)
        labels_NT = torch.full_like(ids_NT, IGNORE_INDEX)  # as the logits are: shifted, and nothing predicts the first token
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            ids_NT[row, :length] = sample.tokens_T
            labels_NT[row, : length - 1] = sample.labels_T[1:]
        real_NT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        live = (labels_NT != IGNORE_INDEX).any(0).nonzero()
        first = int(live[0]) if len(live) else max(lengths) - 1
        logits_NTV = self.model(
            input_ids=ids_NT.to(self.device), attention_mask=real_NT.to(self.device), use_cache=False, logits_to_keep=max(lengths) - first
        ).logits  # of the answers alone: a prompt's would be the larger part of the memory
        stats = token_stats(logits_NTV, labels_NT[:, first:].to(self.device), vocab_size=self.vocab_size)
        logp_NT, entropy_NT = (torch.zeros(ids_NT.shape) for _ in range(2))
        logp_NT[:, first + 1 :] = stats.logp[:, :-1].float().cpu()
        entropy_NT[:, first + 1 :] = stats.entropy[:, :-1].float().cpu()
        return [(logp_NT[row, :length].clone(), entropy_NT[row, :length].clone()) for row, length in enumerate(lengths)]
