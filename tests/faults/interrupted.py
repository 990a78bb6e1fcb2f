"""The command `megatron-plugin` with something planted in it other than a kill (planted.py), as torchrun starts it or alone:

    PLANT='{"rank": 1, "step": 3, "point": "forward", "do": "raise"}' torchrun ... tests/faults/interrupted.py train configs/...

do: "raise" an error; "wait" 3 seconds in that place, the file PLANT["mark"] made before, so that a signal can be sent meanwhile.
save_fails: the first save fails on that rank, as on a full disk.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import megatron_plugin.cli  # noqa: F401  here as in the console script: a spawned process imports this file
from tests.faults import planted


class PlantedError(Exception):
    pass


def main() -> int:
    from megatron_plugin.cli import main as cli
    from megatron_plugin.trainer import loop

    plant = json.loads(os.environ["PLANT"])
    if plant["rank"] == int(os.environ.get("RANK", 0)):
        planted._after(loop, "start", planted.RUN.append)
        (POINTS | planted.POINTS)[plant["point"]](lambda: _act(plant))
        if plant.get("save_fails"):
            _fail_first_save()
    return cli(sys.argv[1:])


def _act(plant: dict) -> None:
    """Once, in the planned step.  At points without a run, at once."""
    if plant.get("done") or (plant["step"] and (not planted.RUN or planted.RUN[0].step + 1 < plant["step"])):
        return
    plant["done"] = True
    if plant["do"] == "raise":
        Path(plant["mark"]).write_text(str(time.time()))
        raise PlantedError(f"planted in {plant['point']}")
    Path(plant["mark"]).write_text(str(time.time()))
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        time.sleep(0.05)


def _fail_first_save() -> None:
    from megatron_plugin.hooks.dist_checkpoint import Shards

    original = Shards.write

    def fails(shards):
        Shards.write = original
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Shards.write = fails


def _in_reading(act):
    from megatron_plugin.trainer import datasets

    planted._before(datasets, "read_conversations", act)


def _in_loss(act):
    from megatron_plugin.hooks import head_loss

    planted._before(head_loss, "linear_token_loss", act)


def _in_generation(act):
    from megatron_plugin.rollout.fleet import Fleet

    planted._before(Fleet, "generate", act)


def _in_sync(act):
    from megatron_plugin.trainer.weight_sync import WeightSync

    planted._before(WeightSync, "send", act)


def _in_judging(act):
    from megatron_plugin.trainer.judge import Judge

    planted._before(Judge, "judge", act)


POINTS = {"reading": _in_reading, "loss": _in_loss, "generation": _in_generation, "sync": _in_sync, "judging": _in_judging}

if __name__ == "__main__":
    sys.exit(main())
