"""Options of the hidden-in ops, grouped by whose business they are: the layout's, the model's, the run's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.kernels.main_grad import MainGrad

__all__ = ["Head", "Plan", "TensorParallel"]


@dataclass(frozen=True)
class TensorParallel:
    """How the head is split."""

    group: dist.ProcessGroup | None = None
    """Ranks that hold a shard of the vocabulary each; None: not split."""
    sequence_parallel: bool = False
    """Hidden states are split too, along their first dimension, one slice per rank of `group` (Megatron's sequence parallelism)."""
    vocab_start: int | None = None
    """First column of this rank's shard; None: equal shards in rank order."""


@dataclass(frozen=True)
class Head:
    """What lies between hidden states and the softmax, beside the weight: softmax(softcap tanh((h W^T + bias) / softcap) / temperature)."""

    bias: Tensor | None = None
    """[V_local], the weight's dtype."""
    softcap: float | None = None
    """Logits are bent into (-softcap, softcap) (Gemma 2).  Costs a second buffer of a chunk and two passes over it."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax."""
    vocab_size: int | None = None
    """True vocabulary; columns at or beyond it are Megatron's padding and count as -inf.  None: all columns of all ranks."""


@dataclass(frozen=True)
class Plan:
    """How a call is computed.  Changes time and memory, the result only by rounding (and `min_weight` by what it drops)."""

    chunk_tokens: int | None = None
    """Tokens whose logits exist at once.  None: 1 GiB of logits on a GPU or at least 2048 tokens; 128 MiB, 256 tokens and two chunks on the CPU."""
    logits_dtype: torch.dtype | None = None
    """Of the chunk; None: the hidden states'.  fp32 with bf16 hidden states keeps the logits unrounded at about twice the workspace."""
    rows: Tensor | None = None
    """[L] int64 on the host: places among the flattened labels, ascending, of the tokens that count (mask not 0); only these enter a GEMM.
    The same on every rank of the group.  The data layer knows them; reading them from a GPU would stall its queue."""
    min_weight: float = 0.0
    """One-pass only.  Tokens whose max(|a|, |b|, |c|), coefficient included, lies below it enter neither backward GEMM.  Waits once per chunk."""
    main_grad: MainGrad | None = None
    """Ledger of the weight: dW is added to weight.main_grad, in the one-pass op already in the forward.  None: an ordinary gradient."""
    grad_scale: float | Tensor = 1.0
    """One-pass only.  The factor that the backward will bring (loss scale / micro-batches, say), number or 0-d tensor: gradients formed in the
    forward carry it.  With main_grad it must be right (`MainGrad.finalize` checks); otherwise it saves a multiplication, and fp16 from underflow."""
