"""A run: what is built once, where it starts, and what is kept of it."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.config import Config, ConfigError, as_config_error, save_config
from megatron_plugin.hooks.attach import Handle, attach
from megatron_plugin.hooks.mcore import device
from megatron_plugin.hooks.self_test import check_normalisation
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenLoss
from megatron_plugin.ops import Head
from megatron_plugin.report.environment import write_environment
from megatron_plugin.trainer import checkpoint as checkpoints
from megatron_plugin.trainer.changes import changed_settings, model_record, refuse_other_model
from megatron_plugin.trainer.datasets import Datasets, prepare_datasets
from megatron_plugin.trainer.model import build_model, build_optimizer, transformer_config
from megatron_plugin.trainer.saving import Saver, put_back

__all__ = ["Run", "keep_best", "record", "save", "start"]

log = logging.getLogger("megatron_plugin")


@dataclass
class Run:
    """Everything a step needs."""

    config: Config
    data: Datasets
    loss: TokenLoss
    chunks: list
    optimizer: Any
    scheduler: Any
    handle: Handle
    saver: Saver
    step: int = 0
    position: dict[str, Any] | None = None
    """Of the data, as the checkpoint that the run resumes from has it; None at a fresh start."""
    ramp: Tensor | None = None
    """0-d, the loss's parameter of that name, which every step fills anew; None without a schedule."""
    resumed: tuple[str, ...] = ()
    """What the terminal says of a resume, by line; empty at a fresh start."""


def start(config: Config) -> Run:
    """Build the run and put it where its checkpoint, or the checkpoint it takes its weights from, left off."""
    run_dir = Path(config.run_dir)
    put_back(run_dir)
    source, init = _sources(config, run_dir)
    with as_config_error("loss", config.sources.get("loss.name")):
        loss, ramp = _with_ramp(config, bind(config.loss_name, **config.loss_params))
    weights_from = source or init
    data = prepare_datasets(config, run_dir, weights_from.parent.parent if weights_from else None)
    saved = checkpoints.read_state(weights_from) if weights_from else {}
    if weights_from and saved["vocab_size"] != data.vocab_size:
        raise checkpoints.CheckpointError(f"{weights_from} was trained with a vocabulary of {saved['vocab_size']}, the tokenizer has {data.vocab_size}: "
                                          "use that run's tokenizer (data.tokenizer empty takes it)")  # fmt: skip

    with as_config_error("model"):
        transformer = transformer_config(config)
        chunks = build_model(config, transformer, data.vocab_size)
    refuse_other_model(saved.get("model", {}), model_record(config, transformer), where=str(weights_from), allowed=config.checkpoint.may_differ)
    optimizer, scheduler = build_optimizer(config, transformer, chunks)
    check_normalisation(transformer, chunks[0].ddp_config)
    temperature = config.rollout.temperature if config.rollout else 1.0  # the engine's distribution and the trainer's must be one
    handle = attach(chunks, loss, head=Head(vocab_size=data.vocab_size, temperature=temperature), one_pass=loss.token_local)
    saver = Saver(run_dir, keep=config.checkpoint.keep, best=config.checkpoint.best, asynchronous=config.checkpoint.asynchronous)
    run = Run(config, data, loss, chunks, optimizer, scheduler, handle, saver, ramp=ramp)
    if source is not None:
        state = checkpoints.load_checkpoint(source, chunks, optimizer, verified=True)
        run.step, run.position = state["step"], state["data"]
        run.resumed = (f"resumed from {source} at step {run.step}", *changed_settings(config, source.parent.parent))
        for group in optimizer.param_groups:  # megatron-core prefers the saved ones to the configuration's
            group["max_lr"], group["min_lr"] = config.train.lr, config.train.min_lr
        scheduler.step(increment=run.step)
    elif init is not None:
        checkpoints.load_checkpoint(init, chunks, verified=True)
        optimizer.reload_model_params()
    return run


def _sources(config: Config, run_dir: Path) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, and the one to take only the weights from: at most one of the two, every byte of it verified."""
    resume, there = config.checkpoint.resume, checkpoints.newest(run_dir)
    if resume == "never" and there is not None:
        raise ConfigError(f"checkpoint.resume=never, but {run_dir} already holds {there.name}: choose another run_dir or checkpoint.resume=auto")
    if resume not in ("auto", "never"):
        return checkpoints.usable(resume), None
    if there is not None:
        return checkpoints.usable(run_dir, rename=True), None
    return None, checkpoints.usable(config.checkpoint.init) if config.checkpoint.init else None


def _with_ramp(config: Config, loss: TokenLoss) -> tuple[TokenLoss, Tensor | None]:
    """The loss with a 0-d tensor for its parameter `ramp`, where there is a schedule: kernels take it by address, so no step compiles anew."""
    if config.ramp is None:
        return loss, None
    if "ramp" not in inspect.signature(loss.fn).parameters:
        raise ConfigError(f"got a schedule, expected none: loss {config.loss_name} has no parameter ramp; leave the section out, or use loss.name=idft",
                          "ramp", config.sources.get("ramp.warmup_ratio"))  # fmt: skip
    ramp = torch.ones((), device=device())
    return bind(loss, ramp=ramp), ramp


def record(run: Run) -> None:
    """The run's configuration and environment in its directory; only when everything else has been accepted: a refused command must not change
    a run's record."""
    if dist.get_rank() == 0:
        save_config(run.config, Path(run.config.run_dir) / "config.yaml")
        write_environment(run.config.run_dir, ranks=dist.get_world_size())


def save(run: Run, position: dict[str, Any], *, wait: bool = False) -> None:
    """A checkpoint of the weights, the optimizer and the data's `position`; with `wait` it is on disk when this returns, or SaveError is raised.

    Random numbers, learning rate, mu and ramp need no place in it: each is a function of the step (world.py, model.py, schedules/)."""
    state = {"step": run.step, "data": position, "vocab_size": run.data.vocab_size, "model": model_record(run.config, run.chunks[0].config)}
    run.saver.save(state, run.chunks, run.optimizer, wait=wait)


def keep_best(run: Run, position: dict[str, Any], metrics: dict[str, float]) -> None:
    """Save the step, if checkpoint.best names a metric that has just been better than ever, and keep it until a better one comes."""
    name = run.config.checkpoint.best
    if not name:
        return
    if name not in metrics:
        log.warning("checkpoint.best=%s: the evaluation of step %d has no such metric, but %s", name, run.step, ", ".join(k for k in metrics if k.startswith("eval/")))
        return
    if not run.saver.is_better(metrics[name]):
        return
    run.saver.finish()
    if run.saver.saved != run.step:
        save(run, position)
        run.saver.finish()
    run.saver.mark_best(run.step, metrics[name])
