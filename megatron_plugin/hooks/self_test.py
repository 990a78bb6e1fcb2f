"""A check at start-up: does this megatron-core, or fork of it, divide the gradient once, by the token count of all ranks and micro-batches?

Every release and fork has had its own idea (parallel/README.md has the table), and neither Adam nor a loss curve shows a wrong factor.  So
before the first step a probe with one parameter per model chunk goes through the real schedule, groups, DistributedDataParallel and
finalize_model_grads, with unequal masks, one of them empty, and a gradient that is known beforehand:

    check_normalisation(config, ddp_config)         # silent when right; RuntimeError on every rank, naming the factor, when not

The model, its gradients, the configurations and all random states stay as they are: the probe has copies, and draws nothing.

Every stage multiplies by its weight, which is 1: chunk k's gradient is then sum of mask x value on every stage.  k runs over the D x C
data- and context-parallel ranks and the M micro-batches; n_k tokens and the loss sum s_k of a piece.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch import distributed as dist

from megatron_plugin.hooks.mcore import device
from megatron_plugin.parallel.vocab import all_gather

__all__ = ["check_normalisation"]

POSITIONS = 8  # of a micro-batch on one context-parallel rank
LOSS_SCALE = 1000.0  # under fp16; no product of small sizes is like it
TOLERANCE = 1e-4  # relative; sums of small integers in fp32 are exact, and the nearest wrong answer is tens of percent off

# What a copy of the user's configuration must not bring along: callbacks on the user's model, and machinery that looks for layers in it.
NEUTRAL = dict(
    hidden_size=1, params_dtype=torch.float32, pipeline_dtype=torch.float32, sequence_parallel=False, variable_seq_lengths=False,
    enable_autocast=False, timers=None, grad_scale_func=None, no_sync_func=None, grad_sync_func=None, param_sync_func=None,
    num_moe_experts=None, moe_router_enable_expert_bias=False, overlap_moe_expert_parallel_comm=False, mtp_num_layers=None,
    hybrid_context_parallel=False, num_microbatches_with_partial_activation_checkpoints=None, defer_embedding_wgrad_compute=False,
    fine_grained_activation_offloading=False, cuda_graph_impl="none", enable_cuda_graph=False, external_cuda_graph=False,
    config_logger_dir="",
)  # fmt: skip
# NaN checks belong to the training loop's rerun machinery; fp8 parameters and registered buffers to real models.
NEUTRAL_DDP = dict(
    check_for_nan_in_grad=False, check_for_large_grads=False, fp8_param_gather=False, reuse_grad_buf_for_mxfp8_param_ag=False, nccl_ub=False
)


def check_normalisation(
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    *,
    schedule: Callable | None = None,
    ddp: type = DistributedDataParallel,
    finalize: Callable = finalize_model_grads,
) -> None:
    """RuntimeError, on every rank, unless a step's gradient is sum of losses / sum of tokens; silent otherwise.  Takes well under a second.

    Call it on every rank after parallel_state is initialised.  `schedule` (default: get_forward_backward_func()), `ddp` and `finalize` are
    what the training loop uses, where that is not megatron-core's own: config.finalize_model_grads_func is not called, since it may close
    over the model.  ValueError for Megatron-FSDP, whose wrapper shards gradients in another way."""
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise ValueError(
            "got use_megatron_fsdp=True, expected False: the probe reads DistributedDataParallel's gradients; leave the check out"
        )
    schedule = get_forward_backward_func() if schedule is None else schedule
    layout = _Layout.of_this_rank()
    probe_config = _copied(config, NEUTRAL)
    probe_config.microbatch_group_size_per_vp_stage = layout.pipeline
    probe_config.finalize_model_grads_func = finalize
    if config.fp16:
        probe_config.grad_scale_func = partial(torch.mul, LOSS_SCALE)
    chunks = _chunks(probe_config, _copied(ddp_config, NEUTRAL_DDP), ddp, layout)
    _set_overlap(probe_config, config, ddp_config, chunks)
    with torch.enable_grad():
        schedule(
            forward_step_func=_forward_step, data_iterator=[iter(layout.micro_batches()) for _ in chunks], model=chunks,
            num_microbatches=layout.microbatches, micro_batch_size=1, seq_length=POSITIONS * layout.context, forward_only=False,
        )  # fmt: skip
    scale = LOSS_SCALE if config.fp16 else 1.0
    expected = layout.expected() * scale
    got = _worst_of_all_ranks([chunk.module.weight.main_grad for chunk in chunks], expected, sharded=ddp_config.use_distributed_optimizer)
    if not math.isclose(got, expected, rel_tol=TOLERANCE):
        parts = ", ".join(getattr(part, "__name__", type(part).__name__) for part in (schedule, ddp, finalize))
        raise RuntimeError(_message(got / expected, layout, scale, config.calculate_per_token_loss, parts))


@dataclass(frozen=True)
class _Layout:
    """Where this rank is, and what every rank's probe data are."""

    data: int
    context: int
    pipeline: int
    virtual: int | None
    """Model chunks of a stage; None without interleaving."""
    rank: int
    """Of data x context, context fastest: only a number that differs between the ranks."""

    @classmethod
    def of_this_rank(cls) -> _Layout:
        data, context = parallel_state.get_data_parallel_world_size(), parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank() * context + parallel_state.get_context_parallel_rank()
        virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        return cls(data, context, parallel_state.get_pipeline_model_parallel_world_size(), virtual, rank)

    @property
    def microbatches(self) -> int:
        """Three, or the next number that is no other size's, so that a factor has one name.

        Interleaving wants a multiple of its stages, and reaches its steady state with two of them."""
        step, least = (self.pipeline, 2 * self.pipeline) if self.virtual else (1, 3)
        return next(m for m in itertools.count(least, step) if m not in (self.data, self.context, self.data * self.context))

    @staticmethod
    def tokens(rank: int, index: int) -> int:
        """Loss tokens of a micro-batch: 0, 5, 2, 7, ..., the first of rank 0 fully masked."""
        return 5 * (rank + index) % POSITIONS

    def micro_batches(self) -> list[tuple[Tensor, Tensor]]:
        """(value, mask) [POSITIONS, 1, 1] of this rank; long ones have the larger values, or a mean of means would be right."""
        counts = [self.tokens(self.rank, index) for index in range(self.microbatches)]
        positions = torch.arange(POSITIONS, device=device()).view(-1, 1, 1)
        return [(torch.full_like(positions, 1 + n, dtype=torch.float32), (positions < n).float()) for n in counts]

    def _counts(self) -> list[int]:
        return [self.tokens(rank, index) for rank in range(self.data * self.context) for index in range(self.microbatches)]

    def num_tokens(self) -> int:
        return sum(self._counts())

    def expected(self) -> float:
        """Sum of s_k / sum of n_k."""
        return sum(n * (1 + n) for n in self._counts()) / self.num_tokens()

    def mean_of_means(self) -> float:
        """Mean of s_k / n_k over all pieces, what megatron-core makes of it without calculate_per_token_loss."""
        return sum(1 + n if n else 0 for n in self._counts()) / len(self._counts())


class _Probe(MegatronModule):
    """One stage: its input times one weight.  The attributes are those that schedules and finalize_model_grads ask a model for."""

    def __init__(self, config: TransformerConfig, *, pre_process: bool, post_process: bool) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1, device=device()))
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.received: Tensor | None = None

    def set_input_tensor(self, received: Tensor | list[Tensor | None] | None) -> None:
        self.received = received[0] if isinstance(received, list) else received

    def forward(self, value: Tensor) -> Tensor:
        return self.weight * (value if self.pre_process else self.received)


def _forward_step(micro_batches: Iterator[tuple[Tensor, Tensor]], model: torch.nn.Module):
    value, mask = next(micro_batches)
    return model(value), partial(_loss_func, mask)


def _loss_func(mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict]:
    """The plugin's convention: (sum, 0-d int32 count, report)."""
    return (output * mask).sum(), mask.sum().int(), {}


def _chunks(config: TransformerConfig, ddp_config: DistributedDataParallelConfig, ddp: type, layout: _Layout) -> list[torch.nn.Module]:
    """This rank's wrapped probes, one for each model chunk."""
    chunks = []
    for index in range(layout.virtual or 1):
        where = dict(ignore_virtual=False, vp_stage=index) if layout.virtual else {}
        first, last = parallel_state.is_pipeline_first_stage(**where), parallel_state.is_pipeline_last_stage(**where)
        probe = _Probe(config, pre_process=first, post_process=last)
        chunks.append(ddp(config=config, ddp_config=ddp_config, module=probe, disable_bucketing=index > 0))
        chunks[-1].zero_grad_buffer()
    return chunks


def _set_overlap(config: TransformerConfig, user: TransformerConfig, ddp_config: DistributedDataParallelConfig, chunks: list) -> None:
    """The callbacks that a training loop sets when gradients are reduced during the backward, on the probe's chunks."""
    if not ddp_config.overlap_grad_reduce:
        return
    several = len(chunks) > 1
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
    if user.grad_sync_func is not None:  # Megatron-LM's --align-grad-reduce
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks] if several else chunks[0].start_grad_sync


def _copied(config, neutral: dict):
    """A shallow copy with `neutral` in it.  Not dataclasses.replace: __post_init__ would derive fields anew, and may refuse them."""
    probe = copy.copy(config)
    for name, value in neutral.items():
        if hasattr(probe, name):
            setattr(probe, name, value)
    return probe


def _worst_of_all_ranks(gradients: list[Tensor], expected: float, *, sharded: bool) -> float:
    """The gradient that is furthest from `expected`, the same number on every rank, so that all raise or none.

    The distributed optimizer reduces a bucket's beginning, where the only parameter is, to rank 0 of its group; the others hold leftovers."""
    groups = (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    owned = not sharded or dist.get_rank(groups[0]) == 0
    mine = torch.stack([g.float().view(()) for g in gradients]) if owned else torch.tensor([expected], device=device())
    worst = max(mine.tolist(), key=lambda g: _distance(g / expected))
    for group in groups:  # not one gather over the world: it may hold ranks that do not train
        gathered = torch.empty(dist.get_world_size(group), dtype=torch.float64, device=device())
        all_gather(gathered, gathered.new_tensor([worst]), group)
        worst = max(gathered.tolist(), key=lambda g: _distance(g / expected))
    return worst


def _distance(ratio: float) -> float:
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _message(ratio: float, layout: _Layout, scale: float, per_token: bool, parts: str) -> str:
    name, remedy = _explanation(ratio, layout, scale)
    if not per_token:
        remedy = PER_TOKEN
    elif remedy == PER_TOKEN:  # it is set, and this fork does not care
        remedy = REMEDIES["num_microbatches"]
    version = getattr(megatron.core, "__version__", "of unknown version")
    return (
        f"got {ratio:.6g} times the gradient that a step should have in the start-up probe, expected 1 (sum of losses / sum of tokens): "
        f"{ratio:.6g} = {name}; in {parts} of megatron-core {version}, calculate_per_token_loss={per_token}; {remedy}"
    )


def _explanation(ratio: float, layout: _Layout, scale: float) -> tuple[str, str]:
    """(what the factor is, what to do about it)."""
    sizes = {
        "context_parallel_size": layout.context, "data_parallel_size": layout.data, "num_microbatches": layout.microbatches,
        "num_tokens": layout.num_tokens(), "loss scale": scale,
    }  # fmt: skip
    if math.isnan(ratio):
        return "0 / 0, a micro-batch without loss tokens divided by its own count", PER_TOKEN
    if names := _products(ratio, sizes):
        return " or ".join(names), next(text for size, text in REMEDIES.items() if size in names[0])
    if names := _products(ratio / (layout.mean_of_means() / layout.expected()), sizes):
        times = "" if names == ["1"] else f", times {' or '.join(names)}"
        return f"the mean of every micro-batch's own mean{times}", PER_TOKEN
    return "no product of sizes of the layout", MIXED_UP if layout.pipeline == 2 and layout.virtual else UNKNOWN


def _products(ratio: float, sizes: dict[str, float]) -> list[str]:
    """The simplest products of sizes and their inverses that give `ratio`: ['context_parallel_size'], ['1 / num_microbatches'], ..."""
    known = {name: size for name, size in sizes.items() if size != 1}
    found: dict[int, list[str]] = {}
    for powers in itertools.product((0, 1, -1), repeat=len(known)):
        used = list(zip(known, powers, strict=True))
        if math.isclose(ratio, math.prod(known[name] ** power for name, power in used), rel_tol=TOLERANCE):
            above, below = (" * ".join(name for name, power in used if power == sign) for sign in (1, -1))
            below = f"({below})" if " * " in below else below
            found.setdefault(sum(map(abs, powers)), []).append(f"{above or 1} / {below}" if below else above or "1")
    return found[min(found)] if found else []


PER_TOKEN = (
    "set calculate_per_token_loss=True in the TransformerConfig before DistributedDataParallel is built (--calculate-per-token-loss)"
)
MIXED_UP = (
    "set overlap_p2p_comm=True and batch_p2p_comm=False: interleaving over two stages batches messages of both directions between the same "
    "two ranks, and they can arrive as each other's"
)
UNKNOWN = "compare the schedule, DistributedDataParallel and finalize_model_grads of this fork with megatron-core's"
REMEDIES = {  # of the first size that the factor has in it
    "num_tokens": "the end of the step must divide by the token count, once: set config.finalize_model_grads_func to "
    "megatron.core.distributed.finalize_model_grads, or hand its num_tokens on",
    "num_microbatches": "the schedule rescales the loss: its forward_step_calc_loss must leave the sum of a three-tuple alone",
    "data_parallel_size": "DistributedDataParallel averages over ranks: with calculate_per_token_loss its gradient_scaling_factor is 1",
    "context_parallel_size": "either the schedule rescales the loss (its forward_step_calc_loss must leave the sum of a three-tuple alone), or "
    "DistributedDataParallel averages over ranks (its gradient_scaling_factor must be 1)",
    "loss scale": "the loss scale must be applied once, to the loss, through config.grad_scale_func",
}
