"""The training loop, top to bottom: set up, resume, step, evaluate, save, sum up."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_plugin.config import Config, ConfigError, as_config_error, save_config
from megatron_plugin.data import DataError, RowOrder, eval_steps
from megatron_plugin.hooks.accelerators import start_up_line
from megatron_plugin.hooks.attach import Handle, attach
from megatron_plugin.hooks.mcore import check_megatron_core
from megatron_plugin.hooks.self_test import check_normalisation
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.probe import metric_names
from megatron_plugin.ops import Head
from megatron_plugin.trainer import checkpoint as checkpoints
from megatron_plugin.trainer.answers import accuracy
from megatron_plugin.trainer.datasets import Datasets, EvalSet, prepare_datasets
from megatron_plugin.trainer.metrics import RunLog, read_metrics, step_metrics
from megatron_plugin.trainer.model import build_model, build_optimizer, transformer_config
from megatron_plugin.trainer.plots import plot_curves
from megatron_plugin.trainer.step import run_rows
from megatron_plugin.trainer.world import seed_everything, world

__all__ = ["NonFiniteError", "train"]


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number; no weight was changed by the step."""

    exit_code = 17


@dataclass
class Run:
    """Everything a step needs."""

    config: Config
    data: Datasets
    chunks: list
    optimizer: Any
    scheduler: Any
    order: RowOrder
    handle: Handle
    names: list[str]
    step: int = 0


def train(config: Config) -> None:
    """Train as configured, under torchrun or alone; everything the run writes is in config.run_dir."""
    check_megatron_core()
    _refuse(config)
    with world(config):
        torch.use_deterministic_algorithms(config.deterministic and torch.cuda.is_available())
        run = _start(config)
        log = RunLog(config.run_dir, steps=config.train.steps, resumed_at=run.step, leader=dist.get_rank() == 0)
        log.say(start_up_line(packed=config.data.packing))
        log.say(f"{config.loss_name} on {len(run.data.train)} rows: {run.data.train.report}; vocabulary {run.data.vocab_size}")
        for held_out in run.data.evals:
            log.say(f"held out, {held_out.name}: {held_out.rows.report}")
        while run.step < config.train.steps:
            metrics = _step(run)
            last = run.step == config.train.steps
            if last or (config.checkpoint.interval and run.step % config.checkpoint.interval == 0):
                _save(run)  # before the evaluation: what fails there costs no work
            if last or (config.train.eval_interval and run.step % config.train.eval_interval == 0):
                metrics |= evaluate(run, answers=last)
            log.step(run.step, metrics, show=last or run.step % config.train.log_interval == 0)
        log.close()
        _sum_up(run, log)


def _step(run: Run) -> dict[str, float]:
    """One optimizer step; its metrics.  NonFiniteError before the weights are touched if loss or gradient is not a number."""
    start, rows = time.perf_counter(), run.order.next_step()
    if not any(run.data.train.loss_tokens(row) for row in rows):
        raise DataError(f"step {run.step + 1} has no token with a loss in its {len(rows)} rows: {_sources(run, rows)}")
    seed_everything(run.config, run.step + 1)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    means = run_rows(run.config, run.chunks, run.handle, run.data.train, rows, run.names, train=True)
    if not math.isfinite(means["lm loss"]):
        raise NonFiniteError(f"step {run.step + 1}: the loss is {means['lm loss']}, no weight was changed; the step's samples: {_sources(run, rows)}")
    run.optimizer.prepare_grads()
    grad_norm = float(run.optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):  # megatron-core would clip nothing and step
        raise NonFiniteError(f"step {run.step + 1}: the gradient norm is {grad_norm}, no weight was changed; the step's samples: {_sources(run, rows)}")
    lr = run.optimizer.param_groups[0]["lr"]
    run.optimizer.step()
    run.scheduler.step(increment=1)
    run.step += 1
    tokens = len(rows) * run.config.data.seq_length
    return step_metrics(means, grad_norm=grad_norm, lr=lr, seconds=time.perf_counter() - start, tokens=tokens,
                        bad_lines=len(run.data.bad_lines))  # fmt: skip


def evaluate(run: Run, *, answers: bool = False) -> dict[str, float]:
    """Plain NLL of every held-out set, whatever the loss; with `answers` also the share answered right."""
    metrics = {}
    for chunk in run.chunks:
        chunk.eval()  # no dropout
    for held_out in run.data.evals:
        metrics[f"eval/{held_out.name}_nll"] = _nll(run, held_out)
        if answers and run.config.data.eval_answers:
            conversations = held_out.conversations[: run.config.data.eval_answers]
            share, asked = accuracy(run.config, run.chunks, run.data.tokenizer, conversations, run.data.vocab_size)
            metrics |= {f"eval/{held_out.name}_accuracy": share, f"eval/{held_out.name}_asked": float(asked)} if asked else {}
    for chunk in run.chunks:
        chunk.train()
    return metrics


def _nll(run: Run, held_out: EvalSet) -> float:
    total = tokens = 0.0
    for rows in eval_steps(len(held_out.rows), run.config.train.global_batch):
        means = run_rows(run.config, run.chunks, run.handle, held_out.rows, rows, run.names, train=False)
        if means["num_tokens"]:
            total, tokens = total + means["nll"] * means["num_tokens"], tokens + means["num_tokens"]
    return total / tokens


def _start(config: Config) -> Run:
    """Build the run and put it where its checkpoint, or the checkpoint it takes its weights from, left off."""
    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    there = checkpoints.newest(run_dir)
    if resume == "never" and there is not None:
        raise ConfigError(f"checkpoint.resume=never, but {run_dir} already holds {there.name}: choose another run_dir or checkpoint.resume=auto")
    source = there if resume in ("auto", "never") else checkpoints.find_checkpoint(resume)
    init = None if source or not config.checkpoint.init else checkpoints.find_checkpoint(config.checkpoint.init)
    with as_config_error("loss", config.sources.get("loss.name")):
        loss = bind(config.loss_name, **config.loss_params)
        names = metric_names(loss)
    weights_from = source or init
    data = prepare_datasets(config, run_dir, weights_from.parent.parent if weights_from else None)
    if weights_from and (saved := checkpoints.read_state(weights_from)["vocab_size"]) != data.vocab_size:
        raise checkpoints.CheckpointError(f"{weights_from} was trained with a vocabulary of {saved}, the tokenizer has {data.vocab_size}: "
                                          "use that run's tokenizer (data.tokenizer empty takes it)")  # fmt: skip

    with as_config_error("model"):
        transformer = transformer_config(config)
        chunks = build_model(config, transformer, data.vocab_size)
    optimizer, scheduler = build_optimizer(config, transformer, chunks)
    check_normalisation(transformer, chunks[0].ddp_config)
    handle = attach(chunks, loss, head=Head(vocab_size=data.vocab_size), one_pass=True)
    order = RowOrder(len(data.train), config.train.global_batch, config.seed, fingerprint=data.train.fingerprint())
    run = Run(config, data, chunks, optimizer, scheduler, order, handle, names)
    if source is not None:
        state = checkpoints.load_checkpoint(source, chunks, optimizer)
        order.load_state_dict(state["data"])
        run.step = state["step"]
        for group in optimizer.param_groups:  # megatron-core prefers the saved ones to the configuration's
            group["max_lr"], group["min_lr"] = config.train.lr, config.train.min_lr
        scheduler.step(increment=run.step)
    elif init is not None:
        checkpoints.load_checkpoint(init, chunks)
        optimizer.reload_model_params()
    if dist.get_rank() == 0:
        save_config(config, run_dir / "config.yaml")  # only now: a refused command must not change a run's record
    return run


def _refuse(config: Config) -> None:
    """What the configuration may say and this trainer cannot do."""
    if config.mu is not None:
        raise ConfigError("the supervised trainer has one source of tokens and no use for a schedule of mu; leave the section out", "mu")
    if config.data.packing and config.transformer.get("window_size") is not None:
        raise ConfigError("a sliding window replaces the mask that keeps packed samples apart; set data.packing=false", "model.window_size")


def _save(run: Run) -> None:
    state = {"step": run.step, "data": run.order.state_dict(), "vocab_size": run.data.vocab_size}
    checkpoints.save_checkpoint(run.config.run_dir, run.chunks, run.optimizer, state, keep=run.config.checkpoint.keep)


def _sum_up(run: Run, log: RunLog) -> None:
    """The curves, the last evaluation, and where everything is."""
    if log.leader:
        run_dir = Path(run.config.run_dir)
        plot_curves({run.config.loss_name: run_dir}, run_dir / "curves.png", title=str(run_dir))
        last = (read_metrics(run_dir) or [{}])[-1]
        log.say("\n".join(f"{name:<28} {value:.4f}" for name, value in last.items() if name.startswith("eval/") and value is not None))
        log.say(f"{run_dir}: config.yaml metrics.jsonl curves.png tensorboard/ tokenizer/ checkpoints/step_{run.step:08d}")
    dist.barrier()


def _sources(run: Run, rows: list[int]) -> str:
    names = [name for row in rows for name in run.data.train.sources(row)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
