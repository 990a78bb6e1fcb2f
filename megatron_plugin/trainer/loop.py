"""The training loop, top to bottom: set up, resume, step, save, evaluate, sum up."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_plugin.config import Config, ConfigError
from megatron_plugin.hooks.accelerators import start_up_line
from megatron_plugin.hooks.mcore import check_megatron_core
from megatron_plugin.trainer.metrics import RunLog, read_metrics, step_metrics
from megatron_plugin.trainer.plots import plot_curves
from megatron_plugin.trainer.run import Run, record, save, start
from megatron_plugin.trainer.supervised import Supervised
from megatron_plugin.trainer.update import NonFiniteError
from megatron_plugin.trainer.world import seed_everything, world

__all__ = ["NonFiniteError", "train"]


def train(config: Config) -> None:
    """Train as configured, under torchrun or alone; everything the run writes is in config.run_dir."""
    check_megatron_core()
    if config.data.packing and config.transformer.get("window_size") is not None:
        raise ConfigError("a sliding window replaces the mask that keeps packed samples apart; set data.packing=false", "model.window_size")
    with world(config):
        torch.use_deterministic_algorithms(config.deterministic and torch.cuda.is_available())
        run = start(config)
        with contextlib.closing(_source(run)) as source:
            record(run)
            log = RunLog(config.run_dir, steps=config.train.steps, resumed_at=run.step, leader=dist.get_rank() == 0)
            _say_what_is_trained(run, source, log)
            if run.step == 0 and config.rollout is not None and config.train.eval_interval:
                log.step(0, _evaluate(run, source, last=False), show=True)  # what reinforcement begins from; the engine answers in seconds
            while run.step < config.train.steps:
                _step(run, source, log)
            log.close()
        _sum_up(run, log)


def _source(run: Run):
    """Where the steps come from."""
    if run.config.rollout is None:
        return Supervised(run)
    from megatron_plugin.trainer.onpolicy import OnPolicy  # its engines need packages that supervised training does without

    return OnPolicy(run)


def _step(run: Run, source, log: RunLog) -> None:
    """One optimizer step and what is due after it."""
    config, start = run.config, time.perf_counter()
    seed_everything(config, run.step + 1)
    means = source.step()
    metrics = step_metrics(means, seconds=time.perf_counter() - start, bad_lines=len(run.data.bad_lines))
    last = run.step == config.train.steps
    if last or (config.checkpoint.interval and run.step % config.checkpoint.interval == 0):
        save(run, source.position())  # before the evaluation: what fails there costs no work
    if last or (config.train.eval_interval and run.step % config.train.eval_interval == 0):
        metrics |= _evaluate(run, source, last=last)
    log.step(run.step, metrics, show=last or run.step % config.train.log_interval == 0)


def _evaluate(run: Run, source, *, last: bool) -> dict[str, float]:
    for chunk in run.chunks:
        chunk.eval()  # no dropout
    metrics = source.evaluate(last=last)
    for chunk in run.chunks:
        chunk.train()
    return metrics


def _say_what_is_trained(run: Run, source, log: RunLog) -> None:
    for line in (start_up_line(packed=run.config.data.packing), *source.report()):
        log.say(line)
    for held_out in run.data.evals:
        log.say(f"held out, {held_out.name}: {held_out.rows.report}")


def _sum_up(run: Run, log: RunLog) -> None:
    """The curves, the last evaluation, and where everything is."""
    if log.leader:
        run_dir = Path(run.config.run_dir)
        plot_curves({run.config.loss_name: run_dir}, run_dir / "curves.png", title=str(run_dir))
        last = (read_metrics(run_dir) or [{}])[-1]
        log.say("\n".join(f"{name:<28} {value:.4f}" for name, value in last.items() if name.startswith("eval/") and value is not None))
        log.say(f"{run_dir}: config.yaml metrics.jsonl curves.png tensorboard/ tokenizer/ checkpoints/step_{run.step:08d}")
    dist.barrier()
