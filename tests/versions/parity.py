"""What run.py starts on two gloo ranks under each megatron-core: our losses in a small GPTModel against megatron-core's own cross-entropy.

Rank 0 prints one line of JSON: {check: "ok" with the measured difference, or what went wrong}.  A check that does not apply is not there.
Differences are relative: of the loss, and the largest of all parameters' ||error|| / ||truth||.
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
# ruff: noqa: E402
import megatron.core
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_plugin import Head, attach
from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.local_spec import local_block_spec
from megatron_plugin.hooks.mcore import check_megatron_core, forward_backward
from megatron_plugin.hooks.self_test import check_normalisation
from tests.tolerances import LAYOUT_GRAD, LAYOUT_LOSS

VOCABULARY, PADDED, SEQUENCE = 37, 48, 8
TINY = 1e-7  # below it on both sides, gradients count as equal


def build(tensor: int):
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, normalization="RMSNorm",
        add_bias_linear=False, tensor_model_parallel_size=tensor, use_cpu_initialization=True, calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_dropout_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False, batch_p2p_sync=False,
    )  # fmt: skip
    model = GPTModel(
        config=config, transformer_layer_spec=local_block_spec(config), vocab_size=PADDED, max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )  # fmt: skip
    with torch.no_grad():  # larger than megatron-core's initialisation, so that probabilities differ
        for p in model.parameters():
            p.add_(0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view_as(p)) if p.dim() > 1 else None
    return config, DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model)


def batches():
    """This rank's two micro-batches of two sequences, masks unequal."""
    made = []
    for i in range(2):
        generator = torch.Generator().manual_seed(10 * i + parallel_state.get_data_parallel_rank())
        tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
        mask = (torch.arange(SEQUENCE) < torch.tensor([[SEQUENCE - 3 * i], [2 + i]])).float()
        made.append((tokens[:, :-1], tokens[:, 1:], mask))
    return made


def step(model, forward: Callable) -> tuple[float, dict[str, torch.Tensor]]:
    """One step of megatron-core's schedule: (loss per token over all ranks, gradient of every parameter)."""
    model.zero_grad_buffer()

    def forward_step(iterator, model):
        return forward(model, *next(iterator))

    reports = forward_backward(forward_step, batches(), [model], shape=(2, SEQUENCE), train=True)
    total = torch.stack([report["lm loss"].double() for report in reports]).sum(0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1]), {name: p.main_grad.clone() for name, p in model.named_parameters()}


def masked_sum(mask, per_token):
    """What megatron-core's integrators write as loss_func."""
    total, count = (per_token.float() * mask).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def call(model, tokens, labels, mask, **options):
    positions = torch.arange(SEQUENCE).expand_as(tokens)
    return model(tokens, positions, None, labels=labels, **({"loss_mask": mask} if labels is not None else {}), **options)


def stock(model, tokens, labels, mask):
    return call(model, tokens, labels, mask), partial(masked_sum, mask)


def oracle(model, tokens, labels, mask, *, padding):
    """DFT from megatron-core's logits, gathered, in fp64: -sg(p) log p (arXiv 2508.05629, eq. 9)."""
    logits = gather_from_tensor_model_parallel_region(call(model, tokens, None, mask)).double()
    logp = logits[..., : None if padding else VOCABULARY].log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return -logp.detach().exp() * logp, partial(masked_sum, mask)


def one_pass(handle, model, tokens, labels, mask):
    return call(model, tokens, labels, mask), handle.loss_func


def processed(handle, model, tokens, labels, mask):
    return call(model, tokens, labels, mask, output_processor=handle.output_processor), partial(masked_sum, mask)


def compare(got, want) -> str:
    loss = abs(got[0] - want[0]) / abs(want[0])
    worst, where = 0.0, ""
    for name, truth in want[1].items():
        error, size = (got[1][name].double() - truth.double()).norm(), truth.double().norm()
        if max(size, got[1][name].norm()) > TINY and (relative := float(error / size)) > worst:
            worst, where = relative, name
    assert any(truth.norm() > 1e-3 for truth in want[1].values()), "gradients of nothing prove nothing"
    assert loss <= LAYOUT_LOSS, f"loss {got[0]:.8f}, expected {want[0]:.8f}: {loss:.1e} relative"
    assert worst <= LAYOUT_GRAD, f"gradient of {where}: {worst:.1e} relative"
    return f"ok, loss {loss:.0e}, gradients {worst:.0e}"


def attached(model, way: Callable, want, loss: str, **options) -> str:
    handle = attach(model, loss, **options)
    try:
        return compare(step(model, partial(way, handle) if way is not stock else way), want)
    finally:
        handle.detach()


def detached(model, before, logits_before) -> str:
    """After all the above: the class of the head, the keys, the logits and the loss are what they were, bit for bit."""
    tokens, labels, mask = batches()[0]
    assert type(model.module.output_layer) is tensor_parallel.ColumnParallelLinear, type(model.module.output_layer)
    assert "compute_language_model_loss" not in vars(model.module)
    assert torch.equal(call(model, tokens, None, mask), logits_before), "logits"
    after = step(model, stock)
    assert after[0] == before[0] and all(torch.equal(after[1][name], before[1][name]) for name in before[1]), "loss or gradients"
    return "ok, bit for bit"


def checks(tensor: int):
    """(name, function) of each, in order; every function returns text that begins with ok, or raises."""
    config, model = build(tensor)
    tokens, _, mask = batches()[0]
    logits, ce = call(model, tokens, None, mask).detach(), step(model, stock)
    dft = {padding: step(model, partial(oracle, padding=padding)) for padding in (True, False)}
    yield "sft, two-pass", lambda: attached(model, stock, ce, "sft")
    yield "sft, one-pass", lambda: attached(model, one_pass, ce, "sft", one_pass=True)
    yield "dft, two-pass", lambda: attached(model, stock, dft[True], "dft")
    yield "dft, one-pass, padding masked", lambda: attached(model, one_pass, dft[False], "dft", one_pass=True, head=Head(vocab_size=VOCABULARY))
    if "output_processor" in inspect.signature(GPTModel.forward).parameters:
        yield "dft, output_processor", lambda: attached(model, processed, dft[True], "dft")
    yield "detach", lambda: detached(model, ce, logits)
    yield "normalisation self-test", lambda: check_normalisation(config, model.ddp_config) or "ok"


def main() -> None:
    check_megatron_core()
    dist.init_process_group("gloo")
    results = {"version": megatron.core.__version__}
    for tensor in (1, 2):
        parallel_state.initialize_model_parallel(tensor)
        torch.manual_seed(7)
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        for name, check in checks(tensor):
            try:
                outcome = check()
            except Exception as error:
                traceback.print_exc()
                outcome = f"{type(error).__name__}: {error}".splitlines()[0]
            outcomes = [None] * dist.get_world_size()
            dist.all_gather_object(outcomes, outcome)
            results[f"TP{tensor}{'' if tensor == 2 else ' DP2'}: {name}"] = next((o for o in outcomes if not o.startswith("ok")), outcome)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with cpu_platform():
        main()
