"""What the rank processes of test_dropins.py run: somebody's forward_step under megatron-core's schedule, with and without our loss in it."""

import inspect
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel

from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.dropins.megatron_lm import loss_func
from megatron_plugin.hooks.dropins.schedule import with_loss
from megatron_plugin.hooks.local_spec import local_block_spec
from megatron_plugin.hooks.mcore import forward_backward
from tests.hooks.ranks import PADDED, SEQUENCE, batch_of, config_of


def megatron_lms(data_iterator, model, return_schedule_plan: bool = False):
    """As in pretrain_gpt.py."""
    tokens, labels, mask = next(data_iterator)
    output = model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None, labels=labels, loss_mask=mask)
    return output, partial(loss_func, mask, model=model)


def bridges(state, data_iterator, model, return_schedule_plan: bool = False):
    """As in Megatron-Bridge's gpt_step.py."""
    assert state == "state"
    return megatron_lms(data_iterator, model)


class Functor:
    """As Megatron-Bridge's ForwardStepFunctor."""

    def __call__(self, data_iterator, model):
        return megatron_lms(data_iterator, model)


def by_hand(data_iterator, model):
    """DFT without our ops: megatron-core's cross-entropy is -log p, and DFT weighs it by p."""
    output, loss_func = megatron_lms(data_iterator, model)
    last = parallel_state.is_pipeline_last_stage()
    return (output * (-output.detach()).exp() if last else output), loss_func


def forgets_labels(data_iterator, model):
    """A forward_step that passes labels for the first micro-batch only."""
    tokens, labels, mask = next(data_iterator)
    given = {"labels": labels} if torch.equal(tokens, batch_of(0)[0]) else {}
    return model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None, **given), partial(loss_func, mask)


def _refusals(model):
    """What with_loss says to a schedule plan, and to a forward_step without labels."""
    said = []
    for forward_step, options in [(megatron_lms, {"return_schedule_plan": True}), (forgets_labels, {})]:
        step, batches = with_loss(forward_step, "dft"), iter([batch_of(0), batch_of(1)])
        try:
            for _ in range(2):
                step(batches, model, **options)
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        step.detach()
    return said


def _model(config):
    model = GPTModel(
        config=config, transformer_layer_spec=local_block_spec(config), vocab_size=PADDED, max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view_as(p)) if p.dim() > 1 else None
    return DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model)


def _step(model, forward_step):
    model.zero_grad_buffer()
    reports = forward_backward(forward_step, [batch_of(0), batch_of(1)], [model], shape=(2, SEQUENCE), train=True)
    return reports, torch.cat([p.main_grad.reshape(-1) for p in model.parameters()]).clone()


def steps(group, *, tensor, pipeline, per_token=True):
    """{way: (reports, all gradients of this rank)} of one step each, and whether the model is as it was after detach."""
    with cpu_platform():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        try:
            tensor_parallel.model_parallel_cuda_manual_seed(7)
            config = config_of(
                tensor, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32, batch_p2p_sync=False, calculate_per_token_loss=per_token
            )
            model, results = _model(config), {}
            results["stock"], results["by hand"] = _step(model, megatron_lms), _step(model, by_hand)
            ways = {
                "two-pass": (megatron_lms, {}), "one-pass": (megatron_lms, {"one_pass": True}), "functor": (Functor(), {}), "bridge": (bridges, {})
            }  # fmt: skip
            for way, (forward_step, options) in ways.items():
                if options and not per_token:
                    continue
                step = with_loss(forward_step, "dft", **options)
                assert inspect.signature(step) == inspect.signature(forward_step)
                results[way] = _step(model, partial(step, "state") if way == "bridge" else step)
                step.detach()
            results["refused"] = _refusals(model) if pipeline == 1 else []
            results["detached"] = _step(model, megatron_lms)
            return results
        finally:
            parallel_state.destroy_model_parallel()
            dist.barrier(group)
