"""b again, with an expert that is farther from the model, and more supervised steps of it: arms, claims and rule of chord_shift.py.

    python -m benchmarks.dynamics.chord_shift_far
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.dynamics import chord_shift
from benchmarks.dynamics.study import main

SETTINGS = replace(
    chord_shift.SETTINGS, filler=0.3, prompts=16, sft_batch=64, sft_first=20, steps=40, decay=20, sft_alone=160, every=5
)
STUDY = replace(
    chord_shift.STUDY, name="chord_shift_far", title="b. CHORD Fig. 4: SFT then RL, and mixtures; an expert far from the model", settings=SETTINGS,
    shared={"base": chord_shift.STUDY},
)

if __name__ == "__main__":
    main(STUDY)
