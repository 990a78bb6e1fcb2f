"""The training loop, top to bottom: set up, resume, step, save, evaluate, sum up."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_plugin.config import Config, ConfigError
from megatron_plugin.hooks.accelerators import start_up_line
from megatron_plugin.hooks.mcore import check_megatron_core
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.report.run_page import write_run_page
from megatron_plugin.trainer import signals
from megatron_plugin.trainer.deterministic import make_deterministic
from megatron_plugin.trainer.leaders import RemoteError
from megatron_plugin.trainer.lost_peer import is_lost_peer
from megatron_plugin.trainer.memory import memory_explained
from megatron_plugin.trainer.metrics import RunLog, step_metrics
from megatron_plugin.trainer.perf import Utilisation
from megatron_plugin.trainer.profiling import ProfileWindow
from megatron_plugin.trainer.run import Run, keep_best, record, save, start
from megatron_plugin.trainer.stopwatch import taken
from megatron_plugin.trainer.supervised import Supervised
from megatron_plugin.trainer.trackers import trackers_of
from megatron_plugin.trainer.update import NonFiniteError
from megatron_plugin.trainer.world import seed_everything, world

__all__ = ["NonFiniteError", "train"]


def train(config: Config) -> None:
    """Train as configured, under torchrun or alone; everything the run writes is in config.run_dir.

    StoppedError (exit code 143 or 130), with everything saved, after SIGTERM or Ctrl-C."""
    check_megatron_core()
    if config.data.packing and config.transformer.get("window_size") is not None:
        raise ConfigError("a sliding window replaces the mask that keeps packed samples apart; set data.packing=false", "model.window_size")
    make_deterministic(config)
    with world(config):
        with memory_explained(config, lambda: "building model and optimizer"):
            run = start(config)
        with contextlib.closing(_source(run)) as source, signals.caught():
            record(run)
            log = RunLog(config.run_dir, steps=config.train.steps, resumed_at=run.step, leader=dist.get_rank() == 0, trackers=lambda: trackers_of(config))
            _say_what_is_trained(run, source, log)
            loop = _Loop(run, source, log, began_at=run.step)
            try:
                if run.step == 0 and config.rollout is not None and config.train.eval_interval:
                    log.step(0, loop.evaluate(last=False), show=True)  # what reinforcement begins from; the engine answers in seconds
                while run.step < config.train.steps:
                    loop.step()
            except Exception as error:
                loop.leave_if_stopped(error)
                log.close(failed=True)
                raise
            finally:
                loop.profile.close(run.step)
            log.close()
        _sum_up(run, log)


def _source(run: Run):
    """Where the steps come from."""
    if run.config.rollout is None:
        return Supervised(run)
    from megatron_plugin.trainer.onpolicy import OnPolicy  # its engines need packages that supervised training does without

    return OnPolicy(run)


@dataclass
class _Loop:
    """What is done with a run step by step, and how it is left early."""

    run: Run
    source: Any
    log: RunLog
    began_at: int
    """The step that the run found on disk; 0: none."""

    @cached_property
    def profile(self) -> ProfileWindow:
        return ProfileWindow(self.run.config)

    @cached_property
    def utilisation(self) -> Utilisation:
        config = self.run.config
        return Utilisation(self.run.chunks[0].config, vocabulary=self.run.data.vocab_size, length=config.data.seq_length, peak_tflops=config.log.peak_tflops)

    def step(self) -> None:
        """One optimizer step and what is due after it.  LeaveError on every rank when a signal asked for the end."""
        run, config, start = self.run, self.run.config, time.perf_counter()
        seed_everything(config, run.step + 1)
        taken()  # what an evaluation has left
        self.profile.before(run.step + 1)
        with memory_explained(config, lambda: f"step {run.step + 1}", run=run):
            means = self.source.step()
        seconds = time.perf_counter() - start
        self.profile.after(run.step)
        metrics = step_metrics(means, seconds=seconds, counts=run.data.counts())
        metrics |= taken() | self.utilisation.mfu(tokens=means["tokens"], head_tokens=means["num_tokens"], seconds=means.get("perf/train_s", seconds))
        last, stop = run.step == config.train.steps, self.source.guard.signal
        try:
            run.saver.poll()
            # Not amid steps that are not numbers: where the weights are what broke, it would push the sound checkpoints out.
            due = config.checkpoint.interval and run.step % config.checkpoint.interval == 0 and not self.source.guard.in_a_row
            if last or stop or due:
                save(run, self.source.position(), wait=last or stop)  # before the evaluation: what fails there costs no work
                stop = stop or signals.agreed()  # saving takes longer than a step
            if not stop and (last or (config.train.eval_interval and run.step % config.train.eval_interval == 0)):
                metrics |= self.evaluate(last=last)
                keep_best(run, self.source.position(), metrics)
        finally:
            metrics |= run.saver.metrics()
            self.log.step(run.step, metrics, show=last or run.step % config.train.log_interval == 0)
        if stop:
            raise signals.LeaveError("a signal came")

    def evaluate(self, *, last: bool) -> dict[str, float]:
        start = time.perf_counter()
        for chunk in self.run.chunks:
            chunk.eval()  # no dropout
        with memory_explained(self.run.config, lambda: f"evaluation after step {self.run.step}", run=self.run):
            metrics = self.source.evaluate(last=last)
        for chunk in self.run.chunks:
            chunk.train()
        return metrics | {"perf/evaluate_s": time.perf_counter() - start}

    def leave_if_stopped(self, error: Exception) -> None:
        """StoppedError, with the last completed step saved, where `error` is a signal's doing.  All ranks come here together then."""
        run = self.run
        asked = isinstance(error, signals.LeaveError) or (isinstance(error, RemoteError) and error.exit_code == signals.LeaveError.exit_code)
        if asked:
            run.saver.finish()  # only then is it known whether the save under way has failed
        done = run.step in (run.saver.saved, self.began_at)
        if not asked and not (signals.asked() and done and is_lost_peer(error)):  # with nothing left to save, that another rank has gone already is no failure
            return
        number = signals.asked() if done else signals.agreed()
        if not done:
            save(run, self.source.position(), wait=True)
        self.log.close()
        raise signals.stopped(number or signal.SIGTERM, self._what_is_saved()) from None

    def _what_is_saved(self) -> str:
        if self.run.step == 0:
            return "no step was done, nothing is saved"
        return f"step {self.run.step} of {self.run.config.train.steps} is saved in {self.run.config.run_dir}; the same command goes on from there"


def _say_what_is_trained(run: Run, source, log: RunLog) -> None:
    for line in (*run.resumed, start_up_line(packed=run.config.data.packing), *source.report()):
        log.say(line)
    for held_out in run.data.evals:
        log.say(f"held out, {held_out.name}: {held_out.rows.report}")
    for kind, count in run.data.bad_lines.by_kind().most_common():
        log.say(f"left out, {count} bad lines: {kind}")


def _sum_up(run: Run, log: RunLog) -> None:
    """The page, the last evaluation, and where everything is."""
    if log.leader:
        run_dir = Path(run.config.run_dir)
        try:
            write_run_page(run_dir)
        except Exception as error:  # a full disk, a package that is missing: the run is done all the same
            log.say(f"no report.html: {type(error).__name__}: {error}; `megatron-plugin report {run_dir}` makes it")
        last = (read_metrics(run_dir) or [{}])[-1]
        log.say("\n".join(f"{name:<28} {value:.4f}" for name, value in last.items() if name.startswith("eval/") and value is not None))
        log.say(f"{run_dir}: report.html config.yaml metrics.jsonl curves.png tensorboard/ tokenizer/ checkpoints/step_{run.step:08d}")
    dist.barrier()
