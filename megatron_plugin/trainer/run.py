"""A run: what is built once, where it starts, and what is kept of it."""

from __future__ import annotations

import inspect
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
from megatron_plugin.trainer import checkpoint as checkpoints
from megatron_plugin.trainer.datasets import Datasets, prepare_datasets
from megatron_plugin.trainer.model import build_model, build_optimizer, transformer_config

__all__ = ["Run", "record", "save", "start"]


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
    step: int = 0
    position: dict[str, Any] | None = None
    """Of the data, as the checkpoint that the run resumes from has it; None at a fresh start."""
    ramp: Tensor | None = None
    """0-d, the loss's parameter of that name, which every step fills anew; None without a schedule."""


def start(config: Config) -> Run:
    """Build the run and put it where its checkpoint, or the checkpoint it takes its weights from, left off."""
    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    there = checkpoints.newest(run_dir)
    if resume == "never" and there is not None:
        raise ConfigError(f"checkpoint.resume=never, but {run_dir} already holds {there.name}: choose another run_dir or checkpoint.resume=auto")
    source = there if resume in ("auto", "never") else checkpoints.find_checkpoint(resume)
    init = None if source or not config.checkpoint.init else checkpoints.find_checkpoint(config.checkpoint.init)
    with as_config_error("loss", config.sources.get("loss.name")):
        loss, ramp = _with_ramp(config, bind(config.loss_name, **config.loss_params))
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
    temperature = config.rollout.temperature if config.rollout else 1.0  # the engine's distribution and the trainer's must be one
    handle = attach(chunks, loss, head=Head(vocab_size=data.vocab_size, temperature=temperature), one_pass=loss.token_local)
    run = Run(config, data, loss, chunks, optimizer, scheduler, handle, ramp=ramp)
    if source is not None:
        state = checkpoints.load_checkpoint(source, chunks, optimizer)
        run.step, run.position = state["step"], state["data"]
        for group in optimizer.param_groups:  # megatron-core prefers the saved ones to the configuration's
            group["max_lr"], group["min_lr"] = config.train.lr, config.train.min_lr
        scheduler.step(increment=run.step)
    elif init is not None:
        checkpoints.load_checkpoint(init, chunks)
        optimizer.reload_model_params()
    return run


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
    """The run's configuration in its directory; only when everything else has been accepted: a refused command must not change a run's record."""
    if dist.get_rank() == 0:
        save_config(run.config, Path(run.config.run_dir) / "config.yaml")


def save(run: Run, position: dict[str, Any]) -> None:
    """A checkpoint of the weights, the optimizer and the data's `position`."""
    state = {"step": run.step, "data": position, "vocab_size": run.data.vocab_size}
    checkpoints.save_checkpoint(run.config.run_dir, run.chunks, run.optimizer, state, keep=run.config.checkpoint.keep)
