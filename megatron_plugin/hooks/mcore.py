"""What we ask of megatron-core, in one place: configuration, model chunks, DDP, optimizer, schedule and groups, with their traps closed.

Between 0.14 and 0.19 constructors gained, lost and moved parameters (groups above all: model_comm_pgs, then pg_collection).  Called by
keyword, and leaving groups to parallel_state, everything in `CALLS` is the same in all of them: examples/megatron_core_dft.py ran unchanged
on 0.14.0, 0.15.3, 0.16.1, 0.17.0, 0.18.2 and 0.19.2 (CPU, TP2) and printed the same losses.  What does differ is translated here
(`context_group_of`) and in dist_checkpoint.py.  A fork whose signatures went another way is told so by `check_megatron_core`.

The trainer and the example build with these; neither knows a version.  b sequences of a micro-batch, s tokens of a whole sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

__all__ = [
    "CALLS", "Groups", "adam", "broadcast_from_last_stage", "check_megatron_core", "context_group_of", "data_parallel", "data_parallel_size", "device",
    "forward_backward", "gpt_chunks", "groups", "make_config",
]  # fmt: skip

CALLS = {
    "models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec": "config use_transformer_engine normalization vp_stage",
    "models.gpt:GPTModel": "config transformer_layer_spec vocab_size max_sequence_length pre_process post_process parallel_output "
    "share_embeddings_and_output_weights position_embedding_type vp_stage",
    "transformer:TransformerConfig": "calculate_per_token_loss finalize_model_grads_func grad_scale_func batch_p2p_sync mtp_num_layers "
    "context_parallel_size virtual_pipeline_model_parallel_size",
    "distributed:DistributedDataParallel": "config ddp_config module disable_bucketing",
    "distributed:DistributedDataParallelConfig": "grad_reduce_in_fp32 use_distributed_optimizer",
    "distributed:finalize_model_grads": "model num_tokens",
    "optimizer:OptimizerConfig": "lr min_lr weight_decay clip_grad adam_beta1 adam_beta2 adam_eps bf16 fp16 params_dtype use_distributed_optimizer",
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


class Groups(NamedTuple):
    """megatron-core's process groups that this rank is in."""

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    """Data parallel without context parallel: ranks that take different rows."""
    dp_cp: dist.ProcessGroup
    """Both: what losses and gradients are summed over."""


def groups() -> Groups:
    """The groups of parallel_state.initialize_model_parallel."""
    return Groups(
        parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_context_parallel_group(), parallel_state.get_data_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )  # fmt: skip


def context_group_of(arguments: Mapping[str, object]) -> dist.ProcessGroup:
    """The context-parallel group among the keyword arguments of a module that megatron-core builds, which name their groups
    model_comm_pgs (0.14) or pg_collection (since); parallel_state's where there is none."""
    given = arguments.get("pg_collection") or arguments.get("model_comm_pgs")
    return given.cp if hasattr(given, "cp") else parallel_state.get_context_parallel_group()


def make_config(**fields: object) -> TransformerConfig:
    """TransformerConfig with one division by all loss tokens per step, interleaved stages that talk one message at a time (see
    `forward_backward`), and, where there is no GPU, without what needs one."""
    if fields.get("virtual_pipeline_model_parallel_size"):
        fields = {"overlap_p2p_comm": True, "batch_p2p_comm": False} | fields
    if not torch.cuda.is_available():  # the fusions are CUDA kernels; batched P2P synchronises a CUDA stream
        fields |= dict(use_cpu_initialization=True, batch_p2p_sync=False, masked_softmax_fusion=False, bias_dropout_fusion=False,
                       bias_activation_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False)  # fmt: skip
    return TransformerConfig(calculate_per_token_loss=True, **fields)


def gpt_chunks(config: TransformerConfig, spec: Callable, **arguments: object) -> list[GPTModel]:
    """This rank's part of a GPT: one chunk, or `virtual_pipeline_model_parallel_size` of them, on the CPU or where megatron-core puts them.

    spec(config, vp_stage=...) gives the layers of a chunk (hooks/local_spec.py); `arguments` are GPTModel's own, vocab_size already padded."""
    virtual = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for stage in range(virtual) if virtual > 1 else [None]:
        place = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}  # without it every chunk would be first and last
        chunks.append(
            GPTModel(
                config=config, transformer_layer_spec=spec(config, vp_stage=stage), parallel_output=True,
                pre_process=parallel_state.is_pipeline_first_stage(**place), post_process=parallel_state.is_pipeline_last_stage(**place),
                **({} if stage is None else {"vp_stage": stage}), **arguments,
            )
        )  # fmt: skip
    return chunks


def data_parallel(
    config: TransformerConfig, chunks: Sequence[torch.nn.Module], *, distributed_optimizer: bool = False, **fields: object
) -> list[DistributedDataParallel]:
    """The chunks in megatron-core's DDP with equal weights on all data-parallel ranks; `config` learns to finalise their gradients.

    `distributed_optimizer`: each data-parallel rank will keep 1/ranks of the optimizer's state.  `fields`: DistributedDataParallelConfig's."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, **fields)
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def adam(
    config: TransformerConfig,
    model_chunks: Sequence[DistributedDataParallel],
    *,
    lr: float,
    steps: int,
    init_lr: float | None = None,
    min_lr: float | None = None,
    warmup_steps: int = 10,
    lr_decay: str = "cosine",
    **fields: float,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """megatron-core's Adam (decoupled decay): (optimizer, scheduler).  The rate rises linearly from init_lr to `lr`, then decays to min_lr at
    `steps`; init_lr and min_lr are lr / 10 unless given.  `fields`: OptimizerConfig's own; without them no weight decay, clipping at 1.

    Call scheduler.step(1) after every optimizer.step().  The optimizer is the distributed one where DDP was built for it.  Also gives
    `config` the loss scale of the optimizer.  Two traps are closed here:
      min_lr: left at None in OptimizerConfig it reaches the parameter groups from 0.16 on, beats the scheduler's own min_lr, and the
      learning rate after the warm-up is an error;
      init_lr: the scheduler sets it in its constructor, so with 0 the first step would change nothing.
    """
    min_lr, fields = lr / 10 if min_lr is None else min_lr, {"weight_decay": 0.0, "clip_grad": 1.0} | fields
    optimizer = get_megatron_optimizer(
        config=OptimizerConfig(
            optimizer="adam", lr=lr, min_lr=min_lr, bf16=config.bf16, fp16=config.fp16, params_dtype=config.params_dtype,
            use_distributed_optimizer=model_chunks[0].ddp_config.use_distributed_optimizer, **fields,
        ),
        model_chunks=list(model_chunks),
    )  # fmt: skip
    config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=lr / 10 if init_lr is None else init_lr, max_lr=lr, min_lr=min_lr,
        lr_warmup_steps=min(warmup_steps, steps - 1),  # the scheduler asserts that the warm-up ends before the decay does
        lr_decay_steps=steps, lr_decay_style=lr_decay, start_wd=fields["weight_decay"], end_wd=fields["weight_decay"], wd_incr_steps=steps,
        wd_incr_style="constant",
    )  # fmt: skip
    return optimizer, scheduler


def forward_backward(
    forward_step: Callable,
    micro_batches: Sequence,
    model_chunks: Sequence[torch.nn.Module],
    *,
    shape: tuple[int, int],
    train: bool,
    collect: bool = False,
) -> list:
    """megatron-core's schedule (1F1B, interleaved or none) over `micro_batches`, all of `shape` [b, s]; with the backward when `train`.

    Returns what loss_func reported, one dict per micro-batch, on the last pipeline stage, and [] on the others.  s is the whole length
    under context parallelism too.  Without `train` gradients are off: megatron-core's forward_only leaves them on and would keep the
    activations.  With `collect`, loss_func(output, non_loss_data=True) may return anything, and that comes back.
    ValueError where two interleaved stages would exchange their messages for each other's."""
    config = model_chunks[0].config
    if len(model_chunks) > 1 and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        # Next and previous stage are then one rank, and of two messages in a batch each side takes the other's: with 4 micro-batches an NLL
        # of 4.7614 instead of 4.7373, and no error.  Megatron-LM's argument parser refuses it too.
        raise ValueError(
            "got config.overlap_p2p_comm=False for two interleaved pipeline stages, expected True: megatron-core would swap activations and "
            "gradients silently; set overlap_p2p_comm=True and batch_p2p_comm=False (make_config does)"
        )
    iterators = [iter(micro_batches) for _ in model_chunks]  # interleaved stages read the same micro-batches, each from its own iterator
    with torch.set_grad_enabled(train):
        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iterators if len(iterators) > 1 else iterators[0], model=list(model_chunks),
            num_microbatches=len(micro_batches), micro_batch_size=shape[0], seq_length=shape[1], forward_only=not train,
            collect_non_loss_data=collect,
        )  # fmt: skip


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def broadcast_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """`values` of the last pipeline stage, on every stage, in place."""
    pp = parallel_state.get_pipeline_model_parallel_group()
    if pp.size() > 1:
        dist.broadcast(values, group=pp, group_src=pp.size() - 1)
    return values
