"""What the rank processes of tests/parallel/test_peers.py run: other trainers' ways, and ours, through the same megatron-core."""

import warnings
from functools import partial

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore", module=r"megatron\.core")
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

from megatron_plugin import token_loss, token_stats  # noqa: E402
from megatron_plugin.hooks.cpu_platform import cpu_platform  # noqa: E402
from megatron_plugin.hooks.forward_step import make_loss_func  # noqa: E402
from megatron_plugin.parallel.context import context_slice  # noqa: E402


class Head(MegatronModule):
    """A model of one matrix [V, H] from hidden states [b, s, H] to logits [b, s, V]."""

    def __init__(self, config, weight):
        super().__init__(config)
        self.weight, self.model_type = torch.nn.Parameter(weight.clone()), ModelType.encoder_or_decoder

    def set_input_tensor(self, received): ...

    def forward(self, hidden):
        return hidden @ self.weight.T


def _nll(logits, labels):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def local_mean(logits, *, labels, loss_mask):
    """(L, report), L the token mean of this micro-batch's own slice: what most loss functions of SFT and RL trainers return."""
    return (_nll(logits, labels) * loss_mask).sum() / loss_mask.sum().clamp(min=1), {}


def clamped_counts(logits, *, labels, loss_mask):
    """(sum, count, report), the count of every sequence at least 1: slime's num_tokens."""
    return (_nll(logits, labels) * loss_mask).sum(), loss_mask.sum(1).clamp_min(1).sum().int(), {}


PEERS = {"local mean": (local_mean, False), "clamped counts": (clamped_counts, True)}


def step(group, *, micro_batches, weight, peer=None, context=1):
    """Gradient of the head after one step of megatron-core's schedule; `peer` None for our loss_func.  micro_batches[data rank]: dicts."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(context_parallel_size=context)
        try:
            config = TransformerConfig(
                num_layers=1, hidden_size=weight.shape[1], num_attention_heads=1, context_parallel_size=context, use_cpu_initialization=True,
                calculate_per_token_loss=PEERS[peer][1] if peer else True, finalize_model_grads_func=finalize_model_grads,
            )  # fmt: skip
            loss_func = PEERS[peer][0] if peer else make_loss_func("sft", config, vocab_size=weight.shape[0])
            model = DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=Head(config, weight))

            def forward_step(batches, model):
                batch = {name: context_slice(x, 1, parallel_state.get_context_parallel_group()) for name, x in next(batches).items()}
                return model(batch["hidden"]), partial(loss_func, labels=batch["labels"], loss_mask=batch["mask"])

            mine = micro_batches[parallel_state.get_data_parallel_rank()]
            shape = mine[0]["labels"].shape
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=iter(mine), model=model, num_microbatches=len(mine), micro_batch_size=shape[0],
                seq_length=shape[1], forward_only=False,
            )  # fmt: skip
            return model.module.weight.main_grad.clone()
        finally:
            parallel_state.destroy_model_parallel()


def _plain_all_reduce(shard, labels, group):
    """log p of the labels as ms-swift gathered it: the rank with the column takes it, and an all_reduce that autograd knows nothing of adds up."""
    place = labels - dist.get_rank(group) * shard.shape[-1]
    mine = (place >= 0) & (place < shard.shape[-1])
    total = shard.exp().sum(-1)
    dist.all_reduce(total, group=group)
    logp_shard = shard - total.log()[..., None]
    logp = torch.where(mine, logp_shard.gather(-1, place.clamp(0, shard.shape[-1] - 1)[..., None])[..., 0], 0.0)
    dist.all_reduce(logp, group=group)
    return logp


def logp_gradient(group, *, logits, labels, peer):
    """(log p of the labels, gradient of their sum in this rank's columns)."""
    shard = logits.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].clone().requires_grad_()
    logp = _plain_all_reduce(shard, labels, group) if peer else token_stats(shard, labels, tp_group=group).logp
    logp.sum().backward()
    return logp.detach(), shard.grad


def entropy_after_loss(group, *, logits, labels, peer):
    """Entropy [b, s] asked for after a cross-entropy of the same logits: megatron-core's, or our op."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(dist.get_world_size(group))
        try:
            shard = logits.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].clone()
            if peer:
                loss = vocab_parallel_cross_entropy(shard, labels).sum()
            else:
                loss = token_loss(shard.requires_grad_(), labels, "sft", tp_group=group).loss_sum
            return loss.detach(), token_stats(shard, labels, tp_group=group).entropy.detach()
        finally:
            parallel_state.destroy_model_parallel()


def padded_nll(group, *, logits, labels, vocab_size, peer):
    """-log p [b, s] where the last columns of the last rank are padding: megatron-core's cross-entropy, or our op."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(dist.get_world_size(group))
        try:
            shard = logits.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].clone()
            if peer:
                return vocab_parallel_cross_entropy(shard, labels)
            return -token_stats(shard, labels, tp_group=group, vocab_size=vocab_size).logp
        finally:
            parallel_state.destroy_model_parallel()
