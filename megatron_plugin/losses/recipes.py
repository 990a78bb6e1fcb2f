"""Published ways of on-policy training, as configuration keys: what else changes when the name of a method is said.

| recipe  | loss  | clips          | dual clip | mean over                        | advantage / | KL         | besides                      |
|---------|-------|----------------|-----------|----------------------------------|-------------|------------|------------------------------|
| grpo    | grpo  | .2, .2         | off       | sequences of their token means   | group std   | k3, .04    |                              |
| dr_grpo | grpo  | .2, .2         | off       | max_tokens x sequences           | 1           | none       |                              |
| dapo    | grpo  | .2, .28        | 10        | tokens                           | group std   | none       | dynamic sampling, overlong   |
| gspo    | gspo  | 3e-4, 4e-4     | -         | sequences of their token means   | group std   | none       |                              |
| cispo   | cispo | off, 4 (r < 5) | -         | tokens                           | group std   | none       |                              |
| chord   | chord | .2, .2         | 3         | tokens of each source            | group std   | none       | mu (schedules/mu.py)         |
| srft    | srft  | (paper: none)  | -         | tokens of each source            | group with its demonstrations | none | one demonstration of 8 |

Sources: arXiv 2402.03300, 2503.20783, 2503.14476 (dual clip and rounds of sampling: its recipe in verl), 2507.18071, 2506.13585, 2508.11408 with
Trinity's mix_chord, 2506.19767.  DAPO's overlong buffer is a fifth of the longest answer (4096 of 20480 tokens), penalty 1: rollout.overlong_buffer
goes with rollout.max_tokens and is not in the table of keys.
"""

from __future__ import annotations

__all__ = ["NO_DUAL_CLIP", "RECIPES"]

NO_DUAL_CLIP = 1e9
"""Above e^20, the largest ratio there is (losses/kl.py: LOG_RATIO_MAX): as good as inf, which configuration files do not take."""

_TOKEN = {"rollout.aggregation": "token", "rollout.advantage_scale": "group"}
_SEQUENCE = {"rollout.aggregation": "sequence", "rollout.advantage_scale": "group"}
_GRPO = {"loss.name": "grpo", "loss.clip_low": 0.2, "loss.clip_high": 0.2, "loss.dual_clip": NO_DUAL_CLIP}

RECIPES: dict[str, dict[str, str | float | int]] = {
    "grpo": {**_GRPO, **_SEQUENCE, "loss.kl": 0.04, "loss.kl_estimator": "k3"},
    "dr_grpo": {**_GRPO, "rollout.aggregation": "constant", "rollout.advantage_scale": "none"},
    "dapo": {**_GRPO, **_TOKEN, "loss.clip_high": 0.28, "loss.dual_clip": 10.0, "rollout.dynamic_sampling": 10},
    "gspo": {"loss.name": "gspo", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4, **_SEQUENCE},
    "cispo": {"loss.name": "cispo", "loss.clip_low": 1.0, "loss.clip_high": 4.0, **_TOKEN},
    "chord": {"loss.name": "chord", "loss.preset": "phi", "loss.clip_low": 0.2, "loss.clip_high": 0.2, "loss.dual_clip": 3.0, **_TOKEN},
    "srft": {"loss.name": "srft", "loss.preset": "paper", **_TOKEN},
}
"""Recipe -> configuration keys and values."""
