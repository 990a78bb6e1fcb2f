"""What the rank processes of tests/trainer run, each in a world of its own size."""

import contextlib
import io
from functools import partial

import torch

from megatron_plugin.config import load_config
from megatron_plugin.report.lines import read_metrics

CONFIG = "configs/debug_cpu.yaml"


def _config(overrides: dict, world_size: int):
    return load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()], world_size=world_size)


def train(group, *, overrides: dict) -> list[dict]:
    """A whole run; the lines of its metrics.jsonl."""
    from megatron_plugin.trainer.loop import train as run

    config = _config(overrides, group.size())
    with contextlib.redirect_stdout(io.StringIO()):
        run(config)
    return read_metrics(config.run_dir)


def one_gradient(group, *, overrides: dict, loss: str) -> tuple[float, dict[str, torch.Tensor]]:
    """(mean loss, this rank's finalised gradients by parameter) of one step with our sft or with megatron-core's own cross-entropy."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_plugin.hooks.cpu_platform import cpu_platform
    from megatron_plugin.trainer.run import start
    from megatron_plugin.trainer.step import run_rows
    from megatron_plugin.trainer.supervised import Supervised

    config = _config(overrides, group.size())
    with contextlib.redirect_stdout(io.StringIO()), cpu_platform():
        parallel_state.initialize_model_parallel(config.parallel.tensor, config.parallel.pipeline)
        torch.manual_seed(config.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
        run = start(config)
        source = Supervised(run)
        rows = source.order.next_step()
        if loss == "megatron":
            means = _megatron_step(config, run, rows)
        else:
            means = run_rows(config, run.chunks, run.handle, run.data.train, rows, source.names, train=True)
        gradients = {n: p.main_grad.clone() for chunk in run.chunks for n, p in chunk.module.named_parameters()}
        parallel_state.destroy_model_parallel()
    return means["lm loss"], gradients


def _megatron_step(config, run, rows) -> dict[str, float]:
    """run_rows with megatron-core's own loss, on the logits that the model gives without labels."""
    from megatron_plugin.data import attention_mask
    from megatron_plugin.hooks.mcore import forward_backward
    from megatron_plugin.hooks.report import token_means

    def forward_step(remaining, model):
        batch = run.data.train.batch(next(remaining))
        logits = model(batch.tokens, batch.position_ids, attention_mask(batch.segment_ids))
        return logits, partial(_megatron_cross_entropy, labels=batch.labels, loss_mask=batch.loss_weight)

    size = config.train.micro_batch
    micro_batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return token_means(forward_backward(forward_step, micro_batches, run.chunks, shape=(size, config.data.seq_length), train=True))


def _megatron_cross_entropy(logits, *, labels, loss_mask):
    """megatron-core's vocabulary-parallel cross-entropy in the same three-tuple.  It counts padded columns, so the test has none."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    live = labels != -100
    losses = vocab_parallel_cross_entropy(logits.float().clone(), labels.where(live, 0))
    total = (losses * loss_mask * live).sum()
    count = (live & (loss_mask != 0)).sum(dtype=torch.int32)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def save_and_load(group, *, overrides: dict, optimizer: bool, sharding: str | None = None, other: dict | None = None) -> str | None:
    """Save a fresh model, with its optimizer in the format `sharding` (None: ours) or without, and load it with one, or another model (`other` overrides) without: the error's text."""
    from megatron_plugin.hooks import dist_checkpoint
    from megatron_plugin.trainer import checkpoint, model, saving
    from megatron_plugin.trainer.world import world

    config = _config(overrides, group.size())
    with contextlib.redirect_stdout(io.StringIO()), world(config):
        transformer = model.transformer_config(config)
        chunks = model.build_model(config, transformer, 320)
        adam, _ = model.build_optimizer(config, transformer, chunks)
        ours, dist_checkpoint.FORMAT = dist_checkpoint.FORMAT, sharding or dist_checkpoint.FORMAT
        try:
            path = saving.save_checkpoint(config.run_dir, chunks, adam if optimizer else None, {"step": 0}, keep=0)
        finally:
            dist_checkpoint.FORMAT = ours
        if other is not None:
            config, adam = _config(overrides | other, group.size()), None
            chunks = model.build_model(config, model.transformer_config(config), 320)
        try:
            checkpoint.load_checkpoint(path, chunks, adam)
        except checkpoint.CheckpointError as error:
            return str(error)


def greedy_answers(group, *, overrides: dict, limit: int) -> list[str]:
    """What the model continues three held-out prompts with."""
    from megatron_plugin.data import ConversationEncoder
    from megatron_plugin.trainer import answers
    from megatron_plugin.trainer.run import start
    from megatron_plugin.trainer.world import world

    config = _config(overrides, group.size())
    with contextlib.redirect_stdout(io.StringIO()), world(config):
        run = start(config)
        encoder = ConversationEncoder(run.data.tokenizer)
        prompts = [encoder.prompt(c) for c in run.data.evals[0].conversations[:3]]
        return answers._continue(config, run.chunks, run.data.tokenizer, prompts, limit, run.data.vocab_size)
