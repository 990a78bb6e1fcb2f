"""What the rank processes of tests/hooks run: a small real GPTModel under megatron-core's own schedule, DDP and optimizer."""

import warnings
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore", module=r"megatron\.core")
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megatron_plugin import LOSSES, TokenInputs  # noqa: E402
from megatron_plugin.hooks.cpu_platform import cpu_platform  # noqa: E402
from megatron_plugin.hooks.forward_step import make_loss_func  # noqa: E402
from megatron_plugin.hooks.local_spec import local_block_spec  # noqa: E402
from megatron_plugin.hooks.mcore import adam, forward_backward  # noqa: E402
from megatron_plugin.hooks.report import token_means  # noqa: E402

VOCABULARY, PADDED, SEQUENCE = 37, 48, 8


@contextmanager
def megatron(tensor):
    """megatron-core's groups and seeds for one test, gone afterwards."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(tensor)
        torch.manual_seed(7)
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def config_of(tensor=1, **fields):
    return TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=tensor,
        use_cpu_initialization=True, **{"calculate_per_token_loss": True, "finalize_model_grads_func": finalize_model_grads} | fields,
    )  # fmt: skip


def model_of(config):
    model = GPTModel(
        config=config,
        transformer_layer_spec=local_block_spec(config),
        vocab_size=PADDED,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    return DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model)


def batch_of(rank):
    """Two sequences; unequal masks, so that means of means would show."""
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    mask = (torch.arange(SEQUENCE) < torch.tensor([[SEQUENCE], [2 + 3 * rank]])).float()
    return tokens[:, :-1], tokens[:, 1:], mask


def forward_step(loss_func, batches, model):
    tokens, labels, mask = next(batches)
    logits = model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None)
    sequence = torch.arange(len(mask), dtype=mask.dtype)[:, None].expand_as(mask).contiguous()
    inputs = TokenInputs(advantage=torch.ones_like(mask), expert=sequence > 0, extra={"sequence": sequence, "reward": sequence})
    return logits, partial(loss_func, labels=labels, loss_mask=mask, inputs=inputs)


def step(model, loss_func):
    """Both ranks' batches, wherever they are computed: one each under DP, both on both under TP.  Returns token means."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    model.zero_grad_buffer()
    batches = [batch_of(i) for i in range(rank, 2, size)]
    reports = forward_backward(partial(forward_step, loss_func), batches, [model], shape=(2, SEQUENCE), train=True)
    return token_means(reports, group=parallel_state.get_data_parallel_group())


def one_layout(group, *, tensor, loss="dft", **fields):
    """(token means, gradient of every norm by name, three learning rates, gradient norm) of one step."""
    with megatron(tensor):
        config = config_of(tensor, **fields)
        model = model_of(config)
        optimizer, scheduler = adam(config, [model], lr=1e-3, steps=3, warmup_steps=1)
        means = step(model, make_loss_func(loss, config, vocab_size=VOCABULARY))
        norms = {name: p.main_grad.clone() for name, p in model.module.named_parameters() if "norm" in name}
        rates = []
        for _ in range(3):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(1)
        _, grad_norm, _ = optimizer.step()
        return means, norms, rates, float(grad_norm)


def slots(group, *, qk_layernorm, normalization):
    """Class of every norm in the built model, by name, and the tags of their parameters."""
    with megatron(2):
        config = config_of(2, qk_layernorm=qk_layernorm, normalization=normalization, sequence_parallel=True)
        model = model_of(config).module
        found = {name: type(m).__module__ + "." + type(m).__name__ for name, m in model.named_modules() if "norm" in name}
        tags = {name: getattr(p, "sequence_parallel", None) for name, p in model.named_parameters() if "norm" in name}
        return found, tags


def every_loss(group):
    """Loss and gradient norm of one step for each of LOSSES."""
    with megatron(2):
        config = config_of(2)
        model, results = model_of(config), {}
        for name in LOSSES:
            means = step(model, make_loss_func(name, config, vocab_size=VOCABULARY))
            results[name] = means["lm loss"], float(torch.stack([p.main_grad.norm() for p in model.parameters()]).norm())
        return results


def call(group, *, logits, labels, loss_mask=None, inputs=None, loss="dft", grad=True, fields=None, **options):
    """loss_func on this rank's columns: (sum, (dtype, shape, value) of num_tokens, report, gradient), or the text of its ValueError."""
    with megatron(2):
        try:
            loss_func = make_loss_func(loss, config_of(2, **(fields or {})), **{"vocab_size": VOCABULARY} | options)
            shard = logits.chunk(2, -1)[dist.get_rank(group)].clone().requires_grad_()
            with torch.set_grad_enabled(grad):
                loss_sum, count, report = loss_func(shard, labels=labels, loss_mask=loss_mask, inputs=inputs)
        except ValueError as error:
            return str(error)
        if grad:
            loss_sum.backward()
        return loss_sum.detach(), (count.dtype, count.shape, int(count)), report, shard.grad


def wrong_group(group):
    """The text of the ValueError for a tp_group of another size than the model's."""
    with megatron(1):
        try:
            make_loss_func("dft", config_of(1), vocab_size=VOCABULARY, tp_group=group)
        except ValueError as error:
            return str(error)
