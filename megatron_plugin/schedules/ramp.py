"""How far the weights of IDFT are on their way from DFT's to its own (arXiv 2602.12222): lambda, the parameter `ramp` of the loss."""

from __future__ import annotations

__all__ = ["ramp_schedule"]


def ramp_schedule(step: int, steps: int, *, warmup_ratio: float, transition_ratio: float) -> float:
    """lambda in [0, 1] of `step`, counted from 0, of `steps` in all: 0, then linear, then 1.

    With progress = step / steps: 0 below warmup_ratio, (progress - warmup_ratio) / transition_ratio below their sum, 1 from there on: the
    released trainer, where lambda = 0 is DFT.  A ratio of 0 leaves its part out: both 0 is 1 from the first step on.
    ValueError for a step or a number of steps that cannot be, or a ratio outside [0, 1].
    """
    for name, count, lowest in (("step", step, 0), ("steps", steps, 1)):
        if not hasattr(count, "__index__") or isinstance(count, bool) or count < lowest:
            raise ValueError(f"ramp_schedule: got {name}={count!r}, expected a whole number of steps, {lowest} or more")
    for name, ratio in (("warmup_ratio", warmup_ratio), ("transition_ratio", transition_ratio)):
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
            raise ValueError(f"ramp_schedule: got {name}={ratio!r}, expected a share of the steps, a number in [0, 1]")
    progress = step / steps
    if progress < warmup_ratio:
        return 0.0
    if progress < warmup_ratio + transition_ratio:  # never where transition_ratio is 0
        return (progress - warmup_ratio) / transition_ratio
    return 1.0
