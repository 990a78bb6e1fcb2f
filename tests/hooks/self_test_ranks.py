"""What the rank processes of tests/hooks/test_self_test.py run: the start-up check on real groups, and forks with one fault each."""

import time
import warnings

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore", module=r"megatron\.core")
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megatron_plugin.hooks.cpu_platform import cpu_platform  # noqa: E402
from megatron_plugin.hooks.self_test import check_normalisation  # noqa: E402


def rescaling_schedule(factor):
    """A fork whose forward_step_calc_loss multiplies the sum of a three-tuple, as megatron-core once did by the context-parallel size."""

    def fork_schedule(*, forward_step_func, **rest):
        def forward_step(iterator, model):
            output, loss_func = forward_step_func(iterator, model)

            def rescaled(output):
                loss, count, report = loss_func(output)
                return loss * factor(rest["num_microbatches"]), count, report

            return output, rescaled

        return get_forward_backward_func()(forward_step_func=forward_step, **rest)

    return fork_schedule


def unclamped_schedule(*, forward_step_func, **rest):
    """A fork that makes local means without a clamp, as megatron-core 0.14 does: 0 / 0 for a fully masked micro-batch."""

    def forward_step(iterator, model):
        output, loss_func = forward_step_func(iterator, model)
        return output, lambda output: (lambda loss, count, report: (loss / count, count, report))(*loss_func(output))

    return get_forward_backward_func()(forward_step_func=forward_step, **rest)


def undivided(model, num_tokens=None, **groups):
    finalize_model_grads(model, None, **groups)


def divided_twice(model, num_tokens=None, **groups):
    finalize_model_grads(model, num_tokens, **groups)
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens)


class AveragingDDP(DistributedDataParallel):
    """A fork whose wrapper averages over ranks whatever the configuration says."""

    def finish_grad_sync(self, *args, **kwargs):
        super().finish_grad_sync(*args, **kwargs)
        self.scale_gradients(1.0 / self.dp_cp_group.size())


FAULTS = {
    None: {},
    "times cp": dict(schedule=rescaling_schedule(lambda _: parallel_state.get_context_parallel_world_size())),
    "divided by micro-batches": dict(schedule=rescaling_schedule(lambda m: 1 / m)),
    "cp over micro-batches": dict(schedule=rescaling_schedule(lambda m: parallel_state.get_context_parallel_world_size() / m)),
    "scaled twice": dict(schedule=rescaling_schedule(lambda _: 1000.0)),
    "some other factor": dict(schedule=rescaling_schedule(lambda _: 1.3)),
    "one rank only": dict(schedule=rescaling_schedule(lambda _: 3.0 if dist.get_rank() == 1 else 1.0)),
    "no clamp": dict(schedule=unclamped_schedule),
    "undivided": dict(finalize=undivided),
    "divided twice": dict(finalize=divided_twice),
    "averaging ddp": dict(ddp=AveragingDDP),
}


def touched(*_, **__):
    raise AssertionError("the self-test called something of the user's")


def config_of(*, tensor=1, pipeline=1, virtual=None, context=1, **fields):
    """A configuration as a training loop leaves it: all callbacks set, on the user's model."""
    config = TransformerConfig(
        num_layers=4, hidden_size=16, num_attention_heads=2, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual, context_parallel_size=context, pipeline_dtype=torch.float32, batch_p2p_sync=False,
        use_cpu_initialization=True, **{"calculate_per_token_loss": True} | fields,
    )  # fmt: skip
    config.finalize_model_grads_func = config.grad_scale_func = config.timers = touched
    config.no_sync_func = config.grad_sync_func = config.param_sync_func = touched
    return config


def check(group, *, layout=None, fields=None, ddp=None, fault=None):
    """(error or None, seconds of the faster of two calls, whether config, ddp_config and random states are what they were)."""
    layout, fields = layout or {}, fields or {}
    with cpu_platform():
        parallel_state.initialize_model_parallel(
            layout.get("tensor", 1), layout.get("pipeline", 1), layout.get("virtual"), context_parallel_size=layout.get("context", 1)
        )
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        try:
            config, ddp_config = config_of(**layout, **fields), DistributedDataParallelConfig(**(ddp or {}))
            before = dict(vars(config)), dict(vars(ddp_config)), torch.get_rng_state(), get_cuda_rng_tracker().get_states()
            error, seconds = None, []
            for _ in range(2):  # the first call pays for lazy imports
                dist.barrier(group)
                started = time.perf_counter()
                try:
                    check_normalisation(config, ddp_config, **FAULTS[fault])
                except (RuntimeError, ValueError) as caught:
                    error = f"{type(caught).__name__}: {caught}"
                seconds.append(time.perf_counter() - started)
            after = dict(vars(config)), dict(vars(ddp_config)), torch.get_rng_state(), get_cuda_rng_tracker().get_states()
            same = all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(before[:2], after[:2], strict=True))
            same &= torch.equal(before[2], after[2]) and all(torch.equal(before[3][k], after[3][k]) for k in before[3])
            return error, min(seconds), same
        finally:
            parallel_state.destroy_model_parallel()
