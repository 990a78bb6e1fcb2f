"""One optimizer step, whatever forms the gradients: nothing is applied that is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_plugin.schedules.ramp import ramp_schedule
from megatron_plugin.trainer.run import Run

__all__ = ["NonFiniteError", "optimizer_step"]


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number; no weight was changed by the step."""

    exit_code = 17


def optimizer_step(run: Run, gradients: Callable[[], dict[str, float]], samples: Callable[[], str]) -> dict[str, float]:
    """Zero the gradients, form them by `gradients` (which returns the step's means), and step; the means, grad_norm, lr and the ramp if there is one.

    NonFiniteError, which names `samples()`, before the weights are touched if loss or gradient is not a number."""
    ramp = _set_ramp(run)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    means = gradients()
    if not math.isfinite(means["lm loss"]):
        raise NonFiniteError(f"step {run.step + 1}: the loss is {means['lm loss']}, no weight was changed; the step's samples: {samples()}")
    run.optimizer.prepare_grads()
    grad_norm = float(run.optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):  # megatron-core would clip nothing and step
        raise NonFiniteError(f"step {run.step + 1}: the gradient norm is {grad_norm}, no weight was changed; the step's samples: {samples()}")
    lr = run.optimizer.param_groups[0]["lr"]
    run.optimizer.step()
    run.scheduler.step(increment=1)
    run.step += 1
    return means | {"grad_norm": grad_norm, "lr": lr} | ramp


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
