"""The share of expert data over the steps (CHORD, arXiv 2508.11408): L = (1 - mu) L_rollout + mu L_expert."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["MU_PRESETS", "mu_schedule"]

MU_PRESETS: dict[str, dict[str, Any]] = {
    # The names are those of loss `chord`'s presets, which have the expert tokens' weight that goes with each.
    # CHORD-mu, token loss sft: the comments of Trinity's yaml, ms-swift's example.  The paper decays over 30 steps in A.1, 200 in Fig. 7.
    "mu": {"warmup_steps": 0, "decay_steps": 200, "peak": 0.9, "valley": 0.05},
    # CHORD-phi, token loss chord_phi: mu is constant.
    "phi": {"warmup_steps": 0, "decay_steps": 0, "peak": 0.1, "valley": 0.1},
    # The paper's importance-sampling baseline, token loss sft_is: no mu of its own is known to us; that of phi, to compare the weights.
    "is": {"warmup_steps": 0, "decay_steps": 0, "peak": 0.1, "valley": 0.1},
    # mix_chord.yaml as shipped, token loss chord_phi.
    "shipped": {"warmup_steps": 200, "decay_steps": 400, "peak": 0.5, "valley": 0.02},
    # The defaults of Trinity's MIXCHORDPolicyLossFn, token loss chord_phi.
    "trinity": {"warmup_steps": 0, "decay_steps": 0, "peak": 0.1, "valley": 0.1},
}
MU_PRESETS |= {f"chord_{name}": MU_PRESETS[name] for name in ("mu", "phi", "is")}


def mu_schedule(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """mu at `step`, counted from 0: linear from 0 to `peak`, then half a cosine down to `valley`, then `valley`.

    The formula of Trinity-RFT and ms-swift, where they agree: mu(0) = 0 with a warm-up; with neither warm-up nor decay mu is `valley` at
    every step and `peak` is never reached.  ValueError for a negative step or length, or unless 0 <= valley <= peak <= 1.
    """
    for name, count in (("step", step), ("warmup_steps", warmup_steps), ("decay_steps", decay_steps)):
        if not hasattr(count, "__index__") or isinstance(count, bool) or count < 0:
            raise ValueError(f"mu_schedule: got {name}={count!r}, expected a whole number of steps, 0 or more")
    for name, share in (("peak", peak), ("valley", valley)):
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"mu_schedule: got {name}={share!r}, expected the share of expert data, a number in [0, 1]")
    if valley > peak:
        raise ValueError(f"mu_schedule: got valley={valley} above peak={peak}, expected valley <= peak; are they exchanged?")
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return float(valley)
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))
