"""Published ways of training, as configuration keys: what else changes when `recipe=<name>` is said.  Imports neither torch nor megatron.

On-policy:

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

IDFT, beta 1 and gamma_min .1 everywhere, cosine decay:

| recipe                | committed run of              | gamma_max | ramp   | lr     | samples a step | tokens of a row | epochs | clip |
|-----------------------|-------------------------------|-----------|--------|--------|----------------|-----------------|--------|------|
| idft                  | the trainer's own defaults    | 2         | .2, .1 | -      | -              | -               | -      | -    |
| idft_7b_instruct      | README, Qwen2.5-7B-Instruct   | 2         | none   | 6e-5   | 128            | 4096            | 3      | 1    |
| idft_7b               | Qwen2.5-7B                    | 2         | .2, .1 | 5e-6   | 128            | 16384           | 3      | .1   |
| idft_1.5b             | Qwen2.5-Math-1.5B             | **1**     | none   | 6e-5   | 256            | 3888            | 1      | 1    |
| idft_1.5b_instruct    | Qwen2.5-Math-1.5B-Instruct    | 2         | none   | 8e-6   | 128            | 8192            | 3      | 1    |

Source: the scripts of github.com/zhangmiaosen2000/Towards-On-Policy-SFT (IDFT/).  Their learning rates are ten times apart: sweep it.  A row there
is one sample; with data.packing=false ours is, too, and otherwise a step of as many rows has more samples.  idft_7b also warms its learning
rate up over a tenth of the steps: set train.warmup_steps.
"""

from __future__ import annotations

__all__ = ["NO_DUAL_CLIP", "RECIPES"]

NO_DUAL_CLIP = 1e9
"""Above e^20, the largest ratio there is (losses/kl.py: LOG_RATIO_MAX): as good as inf, which configuration files do not take."""

_TOKEN = {"rollout.aggregation": "token", "rollout.advantage_scale": "group"}
_SEQUENCE = {"rollout.aggregation": "sequence", "rollout.advantage_scale": "group"}
_GRPO = {"loss.name": "grpo", "loss.clip_low": 0.2, "loss.clip_high": 0.2, "loss.dual_clip": NO_DUAL_CLIP}


def _idft(*, gamma_max: float, ramp: tuple[float, float]) -> dict[str, str | float | int]:
    loss = {"loss.name": "idft", "loss.beta": 1.0, "loss.gamma_min": 0.1, "loss.gamma_max": gamma_max}
    return loss | {"ramp.warmup_ratio": ramp[0], "ramp.transition_ratio": ramp[1]}


def _run(*, lr: float, samples: int, seq_length: int, clip: float = 1.0) -> dict[str, str | float | int]:
    batch = {"train.global_batch": samples, "data.seq_length": seq_length}
    return batch | {"train.lr": lr, "train.min_lr": 0.0, "train.lr_decay": "cosine", "train.clip_grad": clip}


RECIPES: dict[str, dict[str, str | float | int]] = {
    "grpo": {**_GRPO, **_SEQUENCE, "loss.kl": 0.04, "loss.kl_estimator": "k3"},
    "dr_grpo": {**_GRPO, "rollout.aggregation": "constant", "rollout.advantage_scale": "none"},
    "dapo": {**_GRPO, **_TOKEN, "loss.clip_high": 0.28, "loss.dual_clip": 10.0, "rollout.dynamic_sampling": 10},
    "gspo": {"loss.name": "gspo", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4, **_SEQUENCE},
    "cispo": {"loss.name": "cispo", "loss.clip_low": 1.0, "loss.clip_high": 4.0, **_TOKEN},
    "chord": {"loss.name": "chord", "loss.preset": "phi", "loss.clip_low": 0.2, "loss.clip_high": 0.2, "loss.dual_clip": 3.0, **_TOKEN},
    "srft": {"loss.name": "srft", "loss.preset": "paper", **_TOKEN},
    "idft": _idft(gamma_max=2.0, ramp=(0.2, 0.1)),
    "idft_7b_instruct": _idft(gamma_max=2.0, ramp=(0.0, 0.0)) | _run(lr=6e-5, samples=128, seq_length=4096),
    "idft_7b": _idft(gamma_max=2.0, ramp=(0.2, 0.1)) | _run(lr=5e-6, samples=128, seq_length=16384, clip=0.1),
    "idft_1.5b": _idft(gamma_max=1.0, ramp=(0.0, 0.0)) | _run(lr=6e-5, samples=256, seq_length=3888),
    "idft_1.5b_instruct": _idft(gamma_max=2.0, ramp=(0.0, 0.0)) | _run(lr=8e-6, samples=128, seq_length=8192),
}
"""Recipe -> configuration keys and values."""
