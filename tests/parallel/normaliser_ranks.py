"""What the rank processes of tests/parallel/test_normaliser.py run: one step of a head over packed rows, cut over context-parallel ranks."""

import warnings

import torch
import torch.distributed as dist

from megatron_plugin import TokenInputs, token_loss, token_stats
from megatron_plugin.parallel.context import context_gather, context_slice
from megatron_plugin.parallel.normaliser import Source, StepMask, coefficients, count_step, sequence_tokens


def _context_group(group, context):
    """The context-parallel group of this rank: neighbours, as in megatron-core."""
    ranks = dist.get_world_size(group)
    groups = [dist.new_group(range(start, start + context)) for start in range(0, ranks, context)]
    return groups[dist.get_rank(group) // context]


def _sliced(batch, context_group, source_of_lengths="segment_ids"):
    """(this rank's slice of a micro-batch, its StepMask).  The lengths are taken from the whole rows, before slicing."""
    lengths = batch["lengths"] if "lengths" in batch else sequence_tokens(batch["mask"], **{source_of_lengths: batch[source_of_lengths]})
    mine = {name: context_slice(x, 1, context_group) for name, x in (batch | {"lengths": lengths}).items()}
    return mine, StepMask(mine["mask"], sequence_tokens=mine["lengths"], real=mine["segment_ids"] >= 0)


def _divided(group, head, total, tokens):
    """What megatron-core does at the end of a step: one sum over data and context parallel, one division."""
    gradient = torch.zeros_like(head) if head.grad is None else head.grad
    for x in (gradient, total, tokens):
        dist.all_reduce(x, group=group)
    return gradient / tokens.clamp(min=1), total / tokens.clamp(min=1)


def packed_gradient(group, *, micro_batches, context, weight, source, loss="sft"):
    """(gradient of the head, objective, the step's counts).  micro_batches[data rank]: dicts of whole packed rows [b, s, ...]."""
    context_group = _context_group(group, context)
    mine = [_sliced(batch, context_group) for batch in micro_batches[dist.get_rank(group) // context]]
    counts = count_step([mask for _, mask in mine], group)
    head, total, tokens = weight.clone().requires_grad_(), torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for batch, mask in mine:
        out = token_loss(batch["hidden"] @ head.T, batch["labels"], loss, inputs=TokenInputs(coefficient=coefficients(mask, counts, rollout=source)))
        out.loss_sum.backward()
        total, tokens = total + out.loss_sum.detach(), tokens + out.num_tokens
    return *_divided(group, head, total, tokens), counts


def sequence_ratio_gradient(group, *, micro_batches, context, weight):
    """A loss that looks at whole sequences (GSPO's ratio, unclipped): mean over sequences of -A exp(mean over its tokens of logp - old)."""
    context_group, source = _context_group(group, context), Source(denominator="sequence")
    whole = micro_batches[dist.get_rank(group) // context]
    mine = [_sliced(batch, context_group) for batch in whole]
    counts = count_step([mask for _, mask in mine], group)
    head, total, tokens = weight.clone().requires_grad_(), torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for rows, (batch, mask) in zip(whole, mine, strict=True):
        stats = token_stats(batch["hidden"] @ head.T, batch["labels"])
        share = torch.where(mask.loss_mask != 0, (stats.logp - batch["old"]) / mask.sequence_tokens.clamp(min=1), 0.0)
        share = context_gather(share, 1, context_group)  # whole rows again; the backward sums over the ranks that use a sequence
        segments = rows["segment_ids"].clamp(min=0)
        means = torch.zeros(len(share), int(segments.max()) + 1).scatter_add(1, segments, share)  # [b, segments]
        ratio = context_slice(means.gather(1, segments).exp(), 1, context_group)
        loss = (coefficients(mask, counts, rollout=source) * -batch["advantage"] * ratio).sum()
        loss.backward()
        total, tokens = total + loss.detach(), tokens + (mask.loss_mask != 0).sum()
    return _divided(group, head, total, tokens)


def router_gradients(group, *, logits, padding=None, per_token, context=1):
    """Gradient of megatron-core's own load-balancing and z losses in the router's logits, for each micro-batch [s, b, experts]."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_plugin.hooks.cpu_platform import cpu_platform

    with cpu_platform():
        parallel_state.initialize_model_parallel(context_parallel_size=context)
        try:
            config = TransformerConfig(
                num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=logits[0].shape[-1], moe_router_topk=2, add_bias_linear=False,
                moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.01, calculate_per_token_loss=per_token,
                context_parallel_size=context, use_cpu_initialization=True,
            )  # fmt: skip
            router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
            router.set_layer_number(1)
            gradients = []
            for index, whole in enumerate(logits):
                mine = context_slice(whole, 0, parallel_state.get_context_parallel_group()).clone().requires_grad_()
                probabilities, _ = router.routing(mine, None if padding is None else padding[index])
                (probabilities * 0).sum().backward()  # only what the router adds by itself
                gradients.append(mine.grad)
            return gradients
        finally:
            parallel_state.destroy_model_parallel()
