"""What we ask of megatron-core, in one place: signatures, parallel sizes, schedule and optimizer, with their traps closed.

Between 0.14 and 0.19 constructors gained, lost and moved parameters (groups above all: model_comm_pgs, then pg_collection).  Called by
keyword, and leaving groups to parallel_state, everything in `CALLS` is the same in all of them: examples/megatron_core_dft.py ran unchanged
on 0.14.0, 0.15.3, 0.16.1, 0.17.0, 0.18.2 and 0.19.2 (CPU, TP2) and printed the same losses.  So there is nothing to translate yet; a
translation, once needed, belongs here.  What is left is a fork whose signatures went another way: `check_megatron_core` tells it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

__all__ = ["CALLS", "adam", "check_megatron_core", "data_parallel_size", "forward_backward"]

CALLS = {
    "models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec": "config use_transformer_engine normalization vp_stage",
    "models.gpt:GPTModel": "config transformer_layer_spec vocab_size max_sequence_length pre_process post_process parallel_output "
    "share_embeddings_and_output_weights position_embedding_type vp_stage",
    "transformer:TransformerConfig": "calculate_per_token_loss finalize_model_grads_func grad_scale_func batch_p2p_sync mtp_num_layers",
    "distributed:DistributedDataParallel": "config ddp_config module disable_bucketing",
    "distributed:finalize_model_grads": "model num_tokens",
    "optimizer:OptimizerConfig": "lr min_lr weight_decay clip_grad",
    "optimizer:get_megatron_optimizer": "config model_chunks",
    "pipeline_parallel:get_forward_backward_func": "",
}
"""module:callable of megatron.core -> the parameters we pass by keyword."""


def check_megatron_core() -> None:
    """ImportError naming everything in CALLS that the installed megatron-core, or fork of it, does not have."""
    missing = []
    for path, names in CALLS.items():
        module, _, name = path.partition(":")
        try:
            known = inspect.signature(getattr(import_module(f"megatron.core.{module}"), name)).parameters
        except (ImportError, AttributeError) as error:
            missing.append(f"megatron.core.{module}.{name} ({error})")
            continue
        missing += [f"megatron.core.{module}.{name}({parameter}=...)" for parameter in names.split() if parameter not in known]
    if missing:
        version = getattr(import_module("megatron.core"), "__version__", "of unknown version")
        raise ImportError(
            f"got megatron-core {version}, expected one that takes what 0.14 to 0.19 take; it lacks {'; '.join(missing)}: "
            "install megatron-core 0.14 to 0.19, or adapt the calls listed in megatron_plugin/hooks/mcore.py"
        )


def data_parallel_size(
    world_size: int,
    tensor: int,
    pipeline: int,
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocabulary: int,
    micro_batch: int,
    global_batch: int,
    **others: int,
) -> int:
    """The data-parallel ranks that `tensor` x `pipeline` leave of `world_size`.  `vocabulary` is the padded one, batches are in sequences.

    ValueError where megatron-core could not split ranks, model or batch evenly (most of it is bare asserts there), and for any size, those
    of `others` included, below 1."""
    sizes = dict(
        tensor=tensor, pipeline=pipeline, layers=layers, hidden=hidden, heads=heads, micro_batch=micro_batch, global_batch=global_batch
    )
    for name, size in {**sizes, **others}.items():
        if size < 1:
            raise ValueError(f"got {name}={size}, expected 1 or more")
    ranks = max(world_size // (tensor * pipeline), 1)
    for what, whole, by, part in [
        ("ranks", world_size, "tensor x pipeline", tensor * pipeline),
        ("hidden units", hidden, "heads", heads),
        ("attention heads", heads, "tensor", tensor),
        ("columns of the padded vocabulary", vocabulary, "tensor", tensor),
        ("layers", layers, "pipeline", pipeline),
        ("sequences of the global batch", global_batch, "micro batch x data-parallel ranks", micro_batch * ranks),
    ]:
        if whole % part:
            raise ValueError(f"got {by} = {part} for {whole} {what}, expected a divisor of {whole}; change one of the two")
    return ranks


def adam(
    config: TransformerConfig,
    model_chunks: Sequence[DistributedDataParallel],
    *,
    lr: float,
    steps: int,
    warmup_steps: int = 10,
    weight_decay: float = 0.0,
    clip_grad: float = 1.0,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """megatron-core's Adam (decoupled decay), its rate rising linearly to `lr`, then a cosine to lr/10 at `steps`: (optimizer, scheduler).

    Call scheduler.step(1) after every optimizer.step().  Also gives `config` the loss scale of the optimizer.  Two traps are closed here:
      min_lr: left at None in OptimizerConfig it reaches the parameter groups from 0.16 on, beats the scheduler's own min_lr, and the
      learning rate after the warm-up is an error;
      init_lr: the scheduler sets it in its constructor, so with 0 the first step would change nothing.
    """
    warmup_steps = min(warmup_steps, steps - 1)  # the scheduler asserts that the warm-up ends before the decay does
    optimizer = get_megatron_optimizer(
        config=OptimizerConfig(lr=lr, min_lr=lr / 10, weight_decay=weight_decay, clip_grad=clip_grad), model_chunks=list(model_chunks)
    )
    config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=lr / 10, max_lr=lr, min_lr=lr / 10, lr_warmup_steps=warmup_steps, lr_decay_steps=steps, lr_decay_style="cosine",
        start_wd=weight_decay, end_wd=weight_decay, wd_incr_steps=steps, wd_incr_style="constant",
    )  # fmt: skip
    return optimizer, scheduler


def forward_backward(
    forward_step: Callable, micro_batches: Sequence, model_chunks: Sequence[DistributedDataParallel], *, shape: tuple[int, int], train: bool
) -> list[dict]:
    """megatron-core's schedule (1F1B, interleaved or none) over `micro_batches`, all of `shape` [b, s]; with the backward when `train`.

    Returns what loss_func reported, one dict per micro-batch, on the last pipeline stage, and [] on the others.  Without `train` gradients
    are off: megatron-core's forward_only leaves them on and would keep the activations."""
    iterators = [iter(micro_batches) for _ in model_chunks]  # interleaved stages read the same micro-batches, each from its own iterator
    with torch.set_grad_enabled(train):
        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iterators if len(iterators) > 1 else iterators[0], model=list(model_chunks),
            num_microbatches=len(micro_batches), micro_batch_size=shape[0], seq_length=shape[1], forward_only=not train,
        )  # fmt: skip
