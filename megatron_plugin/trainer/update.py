"""One optimizer step, whatever forms the gradients: nothing is applied that is not a number.

A step that is not applied counts like any other: the step number, the learning rate, mu and the data go on, and only the weights and the
optimizer's moments stay as they were.  So what a run does at step n never depends on how many steps were held back, nor on a resume between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_plugin.data.errors import some_of
from megatron_plugin.schedules.ramp import ramp_schedule
from megatron_plugin.trainer import replay
from megatron_plugin.trainer.guard import STRAYS, Guard, Verdict
from megatron_plugin.trainer.run import Run
from megatron_plugin.trainer.stopwatch import timed

__all__ = ["NonFiniteError", "optimizer_step"]

log = logging.getLogger("megatron_plugin")


class NonFiniteError(RuntimeError):
    """train.max_nonfinite steps in a row had a loss or gradient that is not a number; none of them changed a weight."""

    exit_code = 17


def optimizer_step(guard: Guard, gradients: Callable[[], dict[str, float]], samples: Callable[[], Sequence[Sequence[str]]]) -> dict[str, float]:
    """Zero the gradients, form them by `gradients` (which returns the step's means), and step where every rank has a finite loss and gradient;
    the means, grad_norm, lr, the ramp if there is one, guard/skipped_steps, guard/stray_labels and train/spike.

    Collective.  samples(): file:line of the samples in each micro-batch of this replica, asked for when the step is held back or a spike.
    NonFiniteError, which names them, at the last of train.max_nonfinite steps in a row that are not finite."""
    run = guard.run
    ramp = _set_ramp(run)
    guard.begin()
    with timed("forward_backward"):
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        means = gradients()  # numbers of the host: the device has done the backward
    with timed("optimizer"):
        votes = guard.vote(means)
        run.optimizer.prepare_grads()
        verdict = votes.verdict(float(run.optimizer.get_grad_norm()))
    lr = run.optimizer.param_groups[0]["lr"]
    counted = guard.settle(verdict, means)
    if not verdict.finite:
        _held_back(guard, verdict, means, samples())
    elif verdict.spike:
        _spiked(guard, means, samples())
    if verdict.finite and not (verdict.spike and run.config.train.skip_spikes):
        with timed("optimizer"):
            run.optimizer.step()
    run.scheduler.step(increment=1)
    run.step += 1
    return {name: mean for name, mean in means.items() if name != STRAYS} | {"grad_norm": verdict.grad_norm, "lr": lr} | ramp | counted


def _held_back(guard: Guard, verdict: Verdict, means: dict[str, float], samples: Sequence[Sequence[str]]) -> None:
    """Says and keeps what was wrong; NonFiniteError when it has been wrong too often in a row."""
    step, most = guard.run.step + 1, guard.run.config.train.max_nonfinite
    sentence, ranks, sources = replay.describe(guard, verdict, means, samples)
    folder = replay.keep(guard, step, sentence, ranks, sources)
    text = f"step {step}: {sentence}" + (f"; the command that tries it again is in {folder}/step.json" if folder else "")
    if guard.in_a_row >= most:
        raise NonFiniteError(f"{text}; {guard.in_a_row} in a row, train.max_nonfinite is {most}; look at the samples, or lower train.lr; the same command "
                             "goes on from the last checkpoint")  # fmt: skip
    if dist.get_rank() == 0:
        log.warning("%s; %d in a row of the train.max_nonfinite=%d that end the run", text, guard.in_a_row, most)


def _spiked(guard: Guard, means: dict[str, float], samples: Sequence[Sequence[str]]) -> None:
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, [source for part in samples for source in part])
    sources = list(dict.fromkeys(source for own in everyone for source in own))
    if dist.get_rank() == 0:
        done = "no weight was changed" if guard.train.skip_spikes else "applied all the same (train.skip_spikes=false)"
        values = ", ".join(f"{name} {means[name]:.4g}" for name in guard.names)
        log.warning("step %d: %s, more than train.spike_factor=%g times the median of the last steps; %s; the step's samples: %s", guard.run.step + 1,
                    values, guard.train.spike_factor, done, some_of(sources))  # fmt: skip


def _set_ramp(run: Run) -> dict[str, float]:
    """The ramp of the coming step, a function of the step alone: a resumed run has that of the undisturbed one."""
    if run.ramp is None:
        return {}
    schedule = run.config.ramp
    ramp = ramp_schedule(
        run.step, run.config.train.steps, warmup_ratio=schedule.warmup_ratio, transition_ratio=schedule.transition_ratio
    )
    run.ramp.fill_(ramp)
    return {"ramp": ramp}
