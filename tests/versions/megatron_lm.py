"""What run.py starts on two gloo ranks: Megatron-LM's own argument parser, train_step and evaluate, from the wheels of megatron-core >= 0.17,
around a forward_step as in pretrain_gpt.py; with and without the drop-in.

pretrain() itself asserts that there is a GPU; these are functions it calls.  The check of the arguments asks for the GPU's generation, and
gets the answer of a stand-in.  Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
# ruff: noqa: E402
import megatron.core
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import initialize_rerun_state_machine
from megatron.training import training
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.dropins import megatron_lm
from megatron_plugin.hooks.local_spec import local_block_spec
from megatron_plugin.hooks.mcore import adam
from tests.tolerances import DROPIN_MEGATRON_LM

VOCABULARY, PADDED, SEQUENCE = 37, 48, 16


def model(config):
    model = GPTModel(
        config=config, transformer_layer_spec=local_block_spec(config), vocab_size=PADDED, max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(parallel_state.get_tensor_model_parallel_rank())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator)) if p.dim() > 1 else None
    return model


def batches():
    generator = torch.Generator().manual_seed(3)
    while True:
        tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
        mask = (torch.arange(SEQUENCE) < torch.randint(1, SEQUENCE, (2, 1), generator=generator)).float()
        yield tokens[:, :-1], tokens[:, 1:].contiguous(), mask


def forward_step(data_iterator, model, return_schedule_plan: bool = False):
    tokens, labels, loss_mask = next(data_iterator)
    output = model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None, labels=labels, loss_mask=loss_mask)
    return output, partial(megatron_lm.loss_func, loss_mask, model=model)


def by_hand(data_iterator, model, return_schedule_plan: bool = False):
    """DFT without our ops: megatron-core's cross-entropy is -log p, and DFT weighs it by p."""
    output, loss_func = forward_step(data_iterator, model)
    return output * (-output.detach()).exp(), loss_func


def train(step_func, chunks, optimizer, scheduler, config) -> list[dict[str, float]]:
    """What three of Megatron-LM's train_step and one evaluate report, always from the same weights."""
    start = [p.detach().clone() for p in chunks[0].parameters()]
    seen, data = [], batches()
    for i in range(3):
        losses, *_, grad_norm, _, _ = training.train_step(
            step_func, data, chunks, optimizer, scheduler, config, get_forward_backward_func(), iteration=i
        )
        seen.append({name: float(value) for name, value in losses.items()} | {"grad_norm": float(grad_norm)})
    evaluated = training.evaluate(step_func, data, chunks, None, config, eval_iters=1)[0]
    seen.append({name: float(value) for name, value in evaluated.items()})
    with torch.no_grad():
        for p, was in zip(chunks[0].parameters(), start, strict=True):
            p.copy_(was)
        for state in optimizer.optimizer.state.values():
            for value in state.values():
                value.zero_()
    scheduler.num_steps = 0
    scheduler.step(0)
    return seen


def compare(got, want) -> str:
    """Loss and gradient norm of every step, and the evaluation."""
    worst = max(abs(g[name] - w[name]) / abs(w[name]) for g, w in zip(got, want, strict=True) for name in w)
    assert worst <= DROPIN_MEGATRON_LM, f"{worst:.1e} relative: got {got}, expected {want}"
    assert want[0]["grad_norm"] > 0.01 and want[0]["lm loss"] != want[2]["lm loss"]
    return f"ok, {worst:.0e}"


def reports_ours(got) -> str:
    assert all({"lm loss", "nll", "token_prob", "entropy", "weight"} <= set(step) for step in got), got
    assert got[0]["nll"] > 1 and 0 < got[0]["token_prob"] < 1
    return "ok"


def main() -> None:
    results = {"version": megatron.core.__version__}
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(dist.get_world_size())
    args = parse_args(megatron_lm.extra_args_provider)
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    initialize_rerun_state_machine()
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    config = core_transformer_config_from_args(args)
    config.finalize_model_grads_func = finalize_model_grads
    chunks = [DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model(config))]
    optimizer, scheduler = adam(config, chunks, lr=args.lr, steps=args.train_iters, warmup_steps=0)
    run = partial(train, chunks=chunks, optimizer=optimizer, scheduler=scheduler, config=config)
    two_pass, args.plugin_config = args.plugin_config, None
    run(by_hand)  # the optimizer's state exists from here on
    stock, truth, untouched = run(forward_step), run(by_hand), run(megatron_lm.with_plugin(forward_step))
    args.plugin_config = two_pass
    with_dft = run(attached := megatron_lm.with_plugin(forward_step))
    attached.detach()
    args.plugin_config = str(Path(two_pass).with_name("one_pass.yaml"))
    with_one_pass = run(megatron_lm.with_plugin(forward_step))
    for name, check in {
        "without --plugin-config nothing changes": lambda: compare(untouched, stock),
        "dft, two-pass": lambda: compare(with_dft, truth),
        "dft, one-pass": lambda: compare(with_one_pass, truth),
        "our metrics in its log": lambda: reports_ours(with_dft) and reports_ours(with_one_pass),
    }.items():
        try:
            results[name] = check()
        except AssertionError as error:
            results[name] = f"AssertionError: {error}"
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=10)
    with cpu_platform():
        main()
