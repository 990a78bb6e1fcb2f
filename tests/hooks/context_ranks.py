"""What the rank processes of the context-parallel tests run: a small real GPTModel, one step under DDP, every gradient gathered whole."""

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_plugin.data import attention_mask
from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.forward_step import make_loss_func
from megatron_plugin.hooks.local_spec import local_block_spec
from megatron_plugin.hooks.mcore import forward_backward
from megatron_plugin.hooks.report import token_means
from megatron_plugin.parallel.context import context_slice

VOCABULARY, PADDED, SEQUENCE = 37, 48, 32


def batches(packed):
    """Three micro-batches of two rows: unequal masks; in the last one only tokens of the first piece have a loss."""
    for i in range(3):
        generator = torch.Generator().manual_seed(100 + i)
        tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
        ends = torch.tensor([[11, 19], [1, 29]]) if packed else torch.full((2, 2), SEQUENCE)
        segments = (torch.arange(SEQUENCE)[None, :, None] >= ends[:, None]).sum(-1)
        starts = torch.where(segments == 0, 0, torch.where(segments == 1, ends[:, :1], ends[:, 1:]))
        loss_mask = (torch.rand(2, SEQUENCE, generator=generator) < 0.3 + 0.2 * i).float()
        if i == 2:
            loss_mask[:, SEQUENCE // 8 :] = 0
        yield tokens[:, :-1], tokens[:, 1:], loss_mask, torch.arange(SEQUENCE) - starts, segments


def one_step(group, *, tensor, context, loss="dft", packed=False, sequence_parallel=False, positions="rope", **fields):
    """(token means, {parameter: whole gradient}) of one step over the three micro-batches."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(tensor, context_parallel_size=context)
        torch.manual_seed(7)
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        try:
            config = TransformerConfig(**dict(
                num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, hidden_dropout=0.0, attention_dropout=0.0,
                tensor_model_parallel_size=tensor, context_parallel_size=context, sequence_parallel=sequence_parallel, init_method_std=0.3,
                use_cpu_initialization=True, calculate_per_token_loss=True, finalize_model_grads_func=finalize_model_grads,
                apply_rope_fusion=False) | fields)  # fmt: skip
            spec = local_block_spec(config)
            model = GPTModel(config=config, transformer_layer_spec=spec, vocab_size=PADDED, max_sequence_length=SEQUENCE, position_embedding_type=positions)
            model = DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model)
            loss_func = make_loss_func(loss, config, vocab_size=VOCABULARY)
            reports = forward_backward(partial(_forward_step, loss_func, packed), list(batches(packed)), [model], shape=(2, SEQUENCE), train=True)
            means = token_means(reports, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            return means, {name: _whole(p) for name, p in model.module.named_parameters()}
        finally:
            parallel_state.destroy_model_parallel()


def _forward_step(loss_func, packed, micro_batches, model):
    tokens, labels, loss_mask, positions, segments = next(micro_batches)
    cut = partial(context_slice, group=parallel_state.get_context_parallel_group())
    mask = cut(attention_mask(segments), 2) if packed else None
    logits = model(cut(tokens, 1), cut(positions if packed else torch.arange(SEQUENCE).expand_as(tokens), 1), mask)
    return logits, partial(loss_func, labels=cut(labels, 1), loss_mask=cut(loss_mask, 1))


def _whole(parameter):
    """The gradient with its tensor-parallel shards joined.  (Ungated MLP: a gated one's shards interleave.)"""
    gradient = parameter.main_grad.clone()
    if not getattr(parameter, "tensor_model_parallel", False):
        return gradient
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(gradient) for _ in range(group.size())]
    dist.all_gather(shards, gradient, group=group)
    return torch.cat(shards, parameter.partition_dim)


def refusal(group, *, attention, **options):
    """The text of the ValueError when the attention is called with what it cannot do."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(1, context_parallel_size=2)
        try:
            from megatron.core.transformer.enums import AttnMaskType

            from megatron_plugin.hooks.local_attention import ContextParallelAttention

            config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, context_parallel_size=2)
            core = ContextParallelAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
            x = torch.zeros(4, 1, 2, 4)
            core(x, x, x, attention, **options)
        except ValueError as error:
            return str(error)
        finally:
            parallel_state.destroy_model_parallel()
