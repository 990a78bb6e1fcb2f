"""What the rank processes of test_attach_steps.py run: whole steps under megatron-core's DDP and schedule with an attached loss."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from megatron_plugin import Head, attach
from megatron_plugin.hooks.forward_step import make_loss_func
from megatron_plugin.hooks.mcore import forward_backward
from tests.hooks.attach_ranks import _gpt
from tests.hooks.ranks import SEQUENCE, VOCABULARY, batch_of, config_of, megatron


def _forward_step(handle, batches, model, *, forwards: int = 1):
    """The attached loss, or megatron-core's own where there is no handle; of several forwards the last one counts."""
    tokens, labels, mask = next(batches)
    for _ in range(forwards):
        out = model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None, labels=labels, loss_mask=mask)
    return out, handle.loss_func if handle else lambda loss: ((loss * mask).sum(), mask.sum().int(), {})


def half(group, *, dtype: str, scale: float = 1.0) -> dict:
    """DDP(Float16Module(GPT)) under the schedule with a loss scale: fp32 gradients / scale by way, and the loss sums."""
    flag = {dtype: True, "params_dtype": {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype], "pipeline_dtype": torch.float32}
    with megatron(group.size()):
        config = config_of(group.size(), sequence_parallel=group.size() > 1, grad_scale_func=lambda loss: loss * scale, **flag)
        model = DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), module=Float16Module(config, _gpt(config)))
        results = {}
        for way in ("logits", "two_pass", "one_pass", "main_grad"):
            model.zero_grad_buffer()
            loss_func = handle = None
            if way == "logits":
                loss_func = make_loss_func("dft", config, vocab_size=VOCABULARY)
            else:
                handle = attach(model, "dft", head=Head(vocab_size=VOCABULARY), one_pass=way != "two_pass", main_grad=way == "main_grad")
            forward_step = partial(_forward_step, handle) if handle else partial(_logits_step, loss_func)
            reports = forward_backward(forward_step, [batch_of(0), batch_of(1)], [model], shape=(2, SEQUENCE), train=True)
            results[way] = {n: p.main_grad / scale for n, p in model.module.named_parameters()}, sum(float(r["lm loss"][0]) for r in reports)
            if handle:
                handle.detach()
        return results


def _logits_step(loss_func, batches, model):
    tokens, labels, mask = next(batches)
    return model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None), partial(loss_func, labels=labels, loss_mask=mask)


def parameter_gather(group, *, way: str, steps: int = 3) -> dict[str, torch.Tensor]:
    """Weights after some steps with the distributed optimizer and overlap_param_gather, with megatron-core's loss or an attached sft."""
    with megatron(1):
        config = config_of(1)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=500)
        model = DistributedDataParallel(config=config, ddp_config=ddp, module=_gpt(config))
        config.no_sync_func, config.grad_sync_func, config.param_sync_func = model.no_sync, model.start_grad_sync, model.start_param_sync
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True), [model])
        handle = None if way == "stock" else attach(model, "sft", one_pass=way == "one_pass")
        rank = parallel_state.get_data_parallel_rank()
        for step in range(steps):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            forward_backward(partial(_forward_step, handle), [batch_of(rank), batch_of(rank + 2 + step)], [model], shape=(2, SEQUENCE), train=True)
            optimizer.step()
        for bucket_group in model.bucket_groups:
            bucket_group.start_param_sync(force_sync=True)
        return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def mtp_step(group, *, tied: bool, temperature: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    """{way: gradients under DDP and the schedule} of a model with a multi-token-prediction layer."""
    with megatron(group.size()):
        config = config_of(group.size(), mtp_num_layers=1, mtp_loss_scaling_factor=0.5)
        gpt = _gpt(config, tied=tied, mtp=True)
        model = DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=gpt)
        results = {}
        for way in ("stock", "two_pass", "one_pass", "main_grad"):
            handle = None if way == "stock" else attach(model, "sft", head=Head(temperature=temperature), one_pass=way != "two_pass", main_grad=way == "main_grad")
            model.zero_grad_buffer()
            forward_backward(partial(_forward_step, handle), [batch_of(0), batch_of(1)], [model], shape=(2, SEQUENCE), train=True)
            results[way] = {name: p.main_grad.clone() for name, p in gpt.named_parameters()}
            if handle:
                handle.detach()
        return results


def dropped_forward(group, *, way: str) -> tuple[list[str], str, str]:
    """([error or "" of a step in which one forward's loss never meets a backward, of the step after it], kind of finalize during, name of it after)."""
    with megatron(1):
        config = config_of(1)
        model = DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=_gpt(config))
        handle = attach(model, "dft", one_pass=way != "two_pass", main_grad=way == "main_grad")
        messages = [_step(model, handle, forwards=2), _step(model, handle)]
        before = config.finalize_model_grads_func
        handle.detach()
        return messages, type(before).__name__, config.finalize_model_grads_func.__name__


def _step(model, handle, *, forwards: int = 1) -> str:
    """One step of one micro-batch; the text of its RuntimeError or ValueError, or ""."""
    model.zero_grad_buffer()
    try:
        forward_backward(partial(_forward_step, handle, forwards=forwards), [batch_of(0)], [model], shape=(2, SEQUENCE), train=True)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def books(group) -> dict:
    """What becomes of config.finalize_model_grads_func while losses come and go; {case: error or finding}."""
    import copy

    with megatron(1):
        config, found = config_of(1), {}
        stock = config.finalize_model_grads_func
        first, second = (
            DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=_gpt(config)) for _ in range(2)
        )
        one, two = (attach(model, "dft", one_pass=True, main_grad=True) for model in (first, second))
        found["two models take turns"] = [_step(model, handle) for _ in range(2) for model, handle in ((first, one), (second, two))]
        found["a copy has the stock function"] = copy.deepcopy(config).finalize_model_grads_func is stock
        two.detach()
        found["one left"] = config.finalize_model_grads_func is not stock
        one.detach()
        found["none left"] = config.finalize_model_grads_func is stock

        one = attach(first, "dft", one_pass=True, main_grad=True)
        steps = [_step(first, one)]
        inner, calls = config.finalize_model_grads_func, []
        config.finalize_model_grads_func = lambda *a, **k: (calls.append(1), inner(*a, **k))
        steps += [_step(first, one), _step(first, one)]
        one.detach()
        one = attach(first, "dft", one_pass=True, main_grad=True)
        steps.append(_step(first, one))
        found["wrapped by somebody"] = steps, len(calls)
        one.detach()

        config.finalize_model_grads_func = None
        one = attach(first, "dft", one_pass=True, main_grad=True)
        found["nobody divides"] = _step(first, one)
        one.detach()
        found["still nobody"] = config.finalize_model_grads_func is None
        config.finalize_model_grads_func = stock

        one = attach(first, "dft", one_pass=True, main_grad=True)
        tokens, labels, mask = batch_of(0)
        first(tokens, torch.arange(SEQUENCE).expand_as(tokens), None, labels=labels, loss_mask=mask)  # and then the batch turned out bad
        one.forget_step()
        found["a step given up"] = _step(first, one)
        return found
