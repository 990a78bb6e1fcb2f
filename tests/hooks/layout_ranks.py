"""What the rank processes of test_layouts.py run: one checkpoint of a real GPTModel, one batch, one step's loss and gradients in any layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig

from megatron_plugin import Head, TokenInputs, attach, bind
from megatron_plugin.data import attention_mask
from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.forward_step import make_loss_func
from megatron_plugin.hooks.local_spec import local_block_spec
from megatron_plugin.hooks.mcore import data_parallel, forward_backward, gpt_chunks, make_config
from megatron_plugin.hooks.report import token_means
from megatron_plugin.losses.chord import chord_phi
from megatron_plugin.losses.contract import TokenTerms
from megatron_plugin.losses.grpo import grpo
from megatron_plugin.parallel.context import context_slice
from megatron_plugin.parallel.normaliser import Source, StepMask, coefficients, count_step

VOCABULARY, PADDED, SEQUENCE, SAMPLES = 37, 48, 8, 16
MU = 0.3


@dataclass(frozen=True)
class Layout:
    """How a step of SAMPLES sequences is cut; what is left of the ranks is data-parallel."""

    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    sequence: bool = False
    micro_batches: int = 2
    packed: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    tied: bool = False

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.pipeline * self.context)


def chord_grpo(stats, inputs):
    """CHORD's two sources in one batch: expert tokens weighted by p (1 - p), rollouts by GRPO's clipped ratio."""
    expert, rollout = chord_phi(stats, inputs), grpo(stats, inputs)
    return TokenTerms(loss=torch.where(inputs.expert, expert.loss, rollout.loss))


OBJECTIVES = {"sft": bind("sft"), "dft": bind("dft"), "chord_grpo": bind(chord_grpo), "dft_entropy": bind("dft", entropy_bonus=0.01)}
WAYS = ("logits", "two_pass", "one_pass", "main_grad")


def batch() -> dict[str, torch.Tensor]:
    """The step: tokens, shifted labels and what every token brings, [SAMPLES, SEQUENCE] each.  Unequal masks; two samples wholly masked, two
    neighbours of which make an empty micro-batch, and two whose loss tokens one context-parallel rank does not see."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, SEQUENCE + 1), generator=generator)
    place, sample = torch.arange(SEQUENCE), torch.arange(SAMPLES)[:, None]
    mask = (place >= sample % 3) & (place < SEQUENCE - sample % 5)
    mask[6:8] = False
    mask[2:4] = (place >= 2) & (place < 6)
    old_logp = -3.6 + 0.5 * torch.randn(SAMPLES, SEQUENCE, generator=generator)
    advantage = torch.randn(SAMPLES, 1, generator=generator).expand(SAMPLES, SEQUENCE)
    return dict(
        tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=mask.float(), segments=sample.expand(SAMPLES, SEQUENCE),
        expert=(sample % 4 == 1).expand(SAMPLES, SEQUENCE), old_logp=old_logp, advantage=advantage,
    )  # fmt: skip


def _micro_batches(layout: Layout) -> list[dict[str, torch.Tensor]]:
    """This rank's, sliced over context-parallel ranks, with the normaliser's coefficients of two sources."""
    step = {name: x.reshape(SAMPLES // 2, 2 * SEQUENCE) if layout.packed else x for name, x in batch().items()}
    mine = {name: x[parallel_state.get_data_parallel_rank() :: layout.data] for name, x in step.items()}
    context = parallel_state.get_context_parallel_group()
    made = []
    for i in range(layout.micro_batches):
        rows = len(mine["tokens"]) // layout.micro_batches
        part = {name: x[i * rows : (i + 1) * rows] for name, x in mine.items()}
        mask = context_slice(attention_mask(part.pop("segments")), 2, context) if layout.packed else None
        part = {name: context_slice(x, 1, context).contiguous() for name, x in part.items()}
        made.append(part | {"attention_mask": mask})
    masks = [StepMask(part["loss_mask"], part["expert"]) for part in made]
    counts = count_step(masks, parallel_state.get_data_parallel_group(with_context_parallel=True))
    for part, mask in zip(made, masks, strict=True):
        part["coefficient"] = coefficients(mask, counts, expert=Source(share=MU), rollout=Source(share=1 - MU))
    return made


def _config(layout: Layout) -> TransformerConfig:
    return make_config(
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0,
        normalization="RMSNorm", add_bias_linear=False, tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None, context_parallel_size=layout.context,
        sequence_parallel=layout.sequence, pipeline_dtype=torch.float32,
    )  # fmt: skip


def _chunks(config: TransformerConfig, layout: Layout, checkpoint: str | None) -> list[DistributedDataParallel]:
    chunks = gpt_chunks(
        config, local_block_spec, vocab_size=PADDED, max_sequence_length=2 * SEQUENCE, position_embedding_type="rope",
        share_embeddings_and_output_weights=layout.tied,
    )  # fmt: skip
    if checkpoint is not None:
        loaded = dist_checkpointing.load({f"model{i}": model.sharded_state_dict() for i, model in enumerate(chunks)}, checkpoint)
        for i, model in enumerate(chunks):
            model.load_state_dict(loaded[f"model{i}"])
    overlap = dict(overlap_grad_reduce=True, bucket_size=2000) if layout.overlap else {}
    wrapped = data_parallel(config, chunks, distributed_optimizer=layout.distributed_optimizer, **overlap)
    if layout.overlap:
        config.no_sync_func = wrapped[0].no_sync
    return wrapped


def _forward_step(way: str, loss_func, handle, batches, model):
    part = next(batches)
    positions = torch.arange(part["tokens"].shape[1]).expand_as(part["tokens"])
    names = ("coefficient", "expert", "old_logp", "advantage")
    inputs = TokenInputs(**{name: part[name] for name in names})
    if way == "logits":
        return model(part["tokens"], positions, part["attention_mask"]), partial(loss_func, labels=part["labels"], inputs=inputs)
    with handle.inputs(inputs):
        return model(part["tokens"], positions, part["attention_mask"], labels=part["labels"]), handle.loss_func


def _gather_shards(chunks: list[DistributedDataParallel]) -> None:
    """The distributed optimizer leaves each data-parallel rank the sum of its own share only; put the shares together."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for chunk in chunks:
        for bucket_group in chunk.bucket_groups:
            for bucket in bucket_group.buckets:
                share = bucket.grad_data.view(group.size(), -1)[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def _gradients(chunks: list[DistributedDataParallel]) -> list[tuple[str, tuple, tuple, torch.Tensor]]:
    """(key, shape of the whole, offset of this part, this part) of every gradient, under the names of megatron-core's checkpoints."""
    found = []
    for chunk in chunks:
        weights = {p.data_ptr(): p for p in chunk.module.parameters()}
        for entry in chunk.module.sharded_state_dict().values():
            if isinstance(entry, ShardedTensor) and entry.data is not None and entry.data.data_ptr() in weights:
                gradient = weights.pop(entry.data.data_ptr()).main_grad.clone()
                lead = [1] * entry.prepend_axis_num  # layers are stacked in front
                found.append((entry.key, entry.global_shape, entry.global_offset, gradient.view(*lead, *gradient.shape)))
        assert not weights, "parameters that the checkpoint does not know"
    return found


def step(group, *, layout: Layout, checkpoint: str, objectives=tuple(OBJECTIVES), ways=WAYS) -> dict:
    """{(objective, way): (token means on the last stage or None, gradients)} of the step in `layout`, from `checkpoint`."""
    with _megatron(layout):
        config = _config(layout)
        chunks = _chunks(config, layout, checkpoint)
        results = {}
        for objective in objectives:
            for way in ways:
                results[objective, way] = _one(config, chunks, layout, OBJECTIVES[objective], way)
        return results


def _one(config, chunks, layout, loss, way):
    for chunk in chunks:
        chunk.zero_grad_buffer()
    loss_func = handle = None
    if way == "logits":
        loss_func = make_loss_func(loss, config, vocab_size=VOCABULARY)
    else:
        handle = attach(chunks, loss, head=Head(vocab_size=VOCABULARY), one_pass=way != "two_pass", main_grad=way == "main_grad")
    parts = _micro_batches(layout)
    reports = forward_backward(partial(_forward_step, way, loss_func, handle), parts, chunks, shape=tuple(parts[0]["tokens"].shape), train=True)
    if handle is not None:
        handle.detach()
    if layout.distributed_optimizer:
        _gather_shards(chunks)
    means = token_means(reports, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return means or None, _gradients(chunks)


def save(group, *, checkpoint: str, tied: bool) -> None:
    """Write the checkpoint that every layout loads."""
    layout = Layout(tied=tied)
    with _megatron(layout):
        chunk = _chunks(_config(layout), layout, None)[0]
        generator = torch.Generator().manual_seed(5)
        for p in chunk.module.parameters():  # larger than megatron-core's initialisation, so that probabilities differ
            p.data.add_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 0.1))
        dist_checkpointing.save({"model0": chunk.module.sharded_state_dict()}, checkpoint)


class _megatron:
    """megatron-core's groups and seeds for one call."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.platform = layout, cpu_platform()

    def __enter__(self):
        self.platform.__enter__()
        layout = self.layout
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, layout.virtual if layout.virtual > 1 else None, context_parallel_size=layout.context
        )
        torch.manual_seed(7)
        tensor_parallel.model_parallel_cuda_manual_seed(7)

    def __exit__(self, *error):
        parallel_state.destroy_model_parallel()
        self.platform.__exit__(*error)
