"""What the rank processes of test_main_grad.py run: a real GPTModel under megatron-core's DDP and schedule, its head's loss from hidden states."""

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel

from megatron_plugin import Head, MainGrad, Plan, TensorParallel, linear_token_loss, linear_token_stats, token_loss
from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.local_spec import local_block_spec
from megatron_plugin.hooks.mcore import forward_backward
from tests.hooks.ranks import PADDED, SEQUENCE, VOCABULARY, config_of


def _model(config, *, tied, overlap):
    """This stage of a GPT under DDP, in several buckets, so that overlapped reductions start while the backward still runs."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    gpt = GPTModel(
        config=config, transformer_layer_spec=local_block_spec(config), vocab_size=PADDED, max_sequence_length=SEQUENCE, pre_process=first,
        post_process=last, position_embedding_type="rope", share_embeddings_and_output_weights=tied,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=1000)
    return DistributedDataParallel(config=config, ddp_config=ddp, module=gpt)


def _micro_batches(count):
    """The same for every layout; data-parallel ranks take every n-th."""
    generator = torch.Generator().manual_seed(3)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    made = []
    for i in range(count):
        tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
        labels = tokens[:, 1:].masked_fill(torch.arange(SEQUENCE) < i, -100)
        made.append((tokens[:, :-1], labels))
    return made[rank::size]


class _Head:
    """The loss at the head of one model, from the hidden states that its output layer is given."""

    def __init__(self, model, config, *, way, grad_scale):
        self.way, self.grad_scale = way, grad_scale
        self.tp = TensorParallel(parallel_state.get_tensor_model_parallel_group(), config.sequence_parallel)
        self.hidden = self.weight = self.ledger = None
        gpt = model.module
        if parallel_state.is_pipeline_last_stage():
            self.weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else gpt.output_layer.weight
            self.ledger = MainGrad(self.weight)
            gpt.output_layer.register_forward_pre_hook(self._remember)

    def _remember(self, module, arguments):
        self.hidden = arguments[0]

    def __call__(self, logits, *, labels):
        labels = labels.t().contiguous()
        if self.way == "logits":
            out = token_loss(logits.transpose(0, 1), labels, "dft", tp_group=self.tp.group, vocab_size=VOCABULARY)
            return out.loss_sum, out.num_tokens, {"loss": out.loss_sum.detach()}
        ledger = self.ledger if "main_grad" in self.way else None
        plan = Plan(chunk_tokens=5, main_grad=ledger, grad_scale=self.grad_scale if "one_pass" in self.way else 1.0)
        call = dict(tp=self.tp, head=Head(vocab_size=VOCABULARY), plan=plan)
        if "one_pass" in self.way:
            out = linear_token_loss(self.hidden, self.weight, labels, "dft", **call)
            return out.loss_sum, out.num_tokens, {"loss": out.loss_sum.detach()}
        logp = linear_token_stats(self.hidden, self.weight, labels, **call).logp
        loss = -(logp.detach().exp() * logp)[labels != -100].sum()
        return loss, (labels != -100).sum().int(), {"loss": loss.detach()}


def _forward_step(head, batches, model):
    tokens, labels = next(batches)
    return model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None), partial(head, labels=labels)


def gradients(group, *, ways, tensor=1, pipeline=1, sequence_parallel=False, **options):
    """{way: ({parameter: main_grad} of one step, by its name in the whole model; the summed loss; clean)}.  clean: every p.grad is None again, and the head's weight is marked
    as accumulated where it was."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        try:
            config = config_of(tensor, sequence_parallel=sequence_parallel, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32)
            return {way: _steps(config, way, tensor, pipeline, **options) for way in ways}
        except RuntimeError as error:
            return str(error)
        finally:
            parallel_state.destroy_model_parallel()


def _steps(config, way, tensor, pipeline, *, tied=False, overlap=False, scale=1.0, announced=None, steps=1):
    """The last of `steps` steps of 4 micro-batches over all ranks.  scale: what the schedule multiplies every loss with.  announced: what the
    one-pass op is told."""
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    config.grad_scale_func = lambda loss: loss * scale
    model = _model(config, tied=tied, overlap=overlap)
    for name, p in model.module.named_parameters():  # the same in every layout
        _fill(name, p, pipeline, tensor)
    config.no_sync_func = model.no_sync
    head = _Head(model, config, way=way, grad_scale=scale if announced is None else announced)
    for _ in range(steps):
        model.zero_grad_buffer()
        reports = forward_backward(partial(_forward_step, head), _micro_batches(4), [model], shape=(2, SEQUENCE), train=True)
        if head.ledger is not None:
            head.ledger.finalize()
    found = {_whole_name(name, pipeline): p.main_grad.clone() / scale for name, p in model.module.named_parameters()}
    in_place = "main_grad" in way and head.weight is not None
    clean = all(p.grad is None for p in model.parameters()) and (not in_place or head.weight.grad_added_to_main_grad)
    return found, float(sum(r["loss"] for r in reports)), clean


def _whole_name(name, pipeline):
    if "layers." not in name or pipeline == 1:
        return name
    head, _, tail = name.partition("layers.")
    number, _, rest = tail.partition(".")
    return f"{head}layers.{int(number) + parallel_state.get_pipeline_model_parallel_rank()}.{rest}"


def _fill(name, p, pipeline, tensor):
    """Values from the name alone, the same for every layout: this rank's part of the whole tensor."""
    name = _whole_name(name, pipeline)
    name = "output_layer.weight" if name == "embedding.word_embeddings.weight" else name  # tied or not, and on either stage
    shape, dim = list(p.shape), getattr(p, "partition_dim", -1) if getattr(p, "tensor_model_parallel", False) else -1
    if dim >= 0:
        shape[dim] *= tensor
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    whole = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1) + (1.0 if "norm" in name and "weight" in name else 0.0)
    if dim >= 0:
        whole = whole.chunk(tensor, dim)[dist.get_rank(parallel_state.get_tensor_model_parallel_group())]
    p.data.copy_(whole)
