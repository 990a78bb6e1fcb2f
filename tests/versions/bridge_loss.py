"""What run.py starts with Megatron-Bridge's wheel: its own loss function behind a forward_step of its signature, on two gloo ranks.

The package does not import without Transformer Engine; `losses.py` alone does, from its path, and the signatures are read from the source.
Rank 0 prints one line of JSON, as parity.py does.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.rerun_state_machine import initialize_rerun_state_machine

from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.dropins.schedule import with_loss
from megatron_plugin.hooks.mcore import forward_backward
from tests.versions.parity import SEQUENCE, batches, build, call, compare, oracle, step

TRAINING = Path(sys.argv[1]) / "megatron/bridge/training"


def parameters(file: str, function: str) -> list[str]:
    """Of a function in Bridge's source."""
    tree = ast.parse((TRAINING / file).read_text())
    return next([a.arg for a in node.args.args] for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)


def bridge_losses():
    spec = importlib.util.spec_from_file_location("bridge_losses", TRAINING / "losses.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def forward_step(state, data_iterator, model, return_schedule_plan=False):
    """As in gpt_step.py, less its batches."""
    tokens, labels, mask = next(data_iterator)
    loss_func = bridge_losses().create_masked_next_token_loss_function(mask, check_for_nan_in_loss=True, check_for_spiky_loss=False)
    return call(model, tokens, labels, mask), loss_func


def signatures() -> str:
    theirs = parameters("gpt_step.py", "forward_step")
    assert theirs == ["state", "data_iterator", "model", "return_schedule_plan"], theirs
    assert parameters("finetune.py", "finetune")[:2] == ["config", "forward_step_func"]
    return f"ok, ({', '.join(theirs)})"


def trained(model, truth, **options) -> str:
    bridged = with_loss(forward_step, "dft", **options)
    model.zero_grad_buffer()
    reports = forward_backward(partial(bridged, "state"), batches(), [model], shape=(2, SEQUENCE), train=True)
    bridged.detach()
    assert all({"lm loss", "nll", "weight"} <= set(report) and report["nll"].shape == (2,) for report in reports)
    total = torch.stack([report["lm loss"].double() for report in reports]).sum(0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return compare((float(total[0] / total[1]), {name: p.main_grad.clone() for name, p in model.named_parameters()}), truth)


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(2)
    initialize_rerun_state_machine()
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    _, model = build(2)
    truth = step(model, partial(oracle, padding=True))
    results = {"version": TRAINING.parents[2].name}
    checks = {
        "signatures, read from the source": signatures,
        "dft through its masked_next_token_loss": lambda: trained(model, truth),
        "dft, one-pass": lambda: trained(model, truth, one_pass=True),
    }
    for name, check in checks.items():
        try:
            results[name] = check()
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with cpu_platform():
        main()
