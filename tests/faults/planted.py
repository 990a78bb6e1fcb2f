"""The command `megatron-plugin` with a kill -9 planted in it, as torchrun starts it:

    PLANT='{"rank": 2, "step": 7, "point": "backward", "once": "/tmp/x/killed"}' RECORD=/tmp/x torchrun ... tests/faults/planted.py train configs/...

RECORD: a directory in which every rank appends a line per step: loss, gradient norm, and a hash of its weights and optimizer state.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import megatron_plugin.cli  # noqa: E402  here, as the console script has it: what is spawned imports this file too, and ends with its parent

RUN = []
"""The run of this process, once it has started."""


def main() -> int:
    from megatron_plugin.trainer import loop

    _after(loop, "start", RUN.append)
    _record(Path(os.environ["RECORD"]))
    plant = json.loads(os.environ.get("PLANT", "{}"))
    if plant and plant["rank"] == int(os.environ["RANK"]) and not Path(plant["once"]).exists():
        POINTS[plant["point"]](lambda: _kill(plant))
    return megatron_plugin.cli.main(sys.argv[1:])


def _kill(plant: dict) -> None:
    """Once, in the step that is planned (steps are counted from 1, and during step n the run has done n - 1)."""
    if RUN and RUN[0].step + 1 >= plant["step"] and not Path(plant["once"]).exists():
        Path(plant["once"]).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: object, name: str, act: Callable) -> None:
    original = getattr(owner, name)

    def planted(*arguments, **named):
        act()
        return original(*arguments, **named)

    setattr(owner, name, planted)


def _after(owner: object, name: str, act: Callable) -> None:
    original = getattr(owner, name)

    def planted(*arguments, **named):
        result = original(*arguments, **named)
        act(result)
        return result

    setattr(owner, name, planted)


def _in_data(kill):
    from megatron_plugin.data import RowOrder

    _before(RowOrder, "next_step", kill)


def _in_forward(kill):
    from megatron_plugin.trainer import step

    _after(step, "_forward_step", lambda _: kill())


def _in_backward(kill):
    """When the gradient of a weight in the middle of the model has been formed: those before it have none yet."""
    from megatron_plugin.trainer import loop

    def hook(run):
        weights = [p for p in run.chunks[0].module.parameters() if p.requires_grad]
        weights[len(weights) // 2].register_hook(lambda gradient: kill())

    _after(loop, "start", hook)


def _in_collective(kill):
    import torch.distributed as dist

    calls = []

    def at_third():
        calls.append(1)
        if len(calls) % 3 == 0:
            kill()

    _before(dist, "all_reduce", at_third)


def _in_gradients(kill):
    from megatron_plugin.trainer import loop

    _after(loop, "start", lambda run: _before(run.optimizer, "prepare_grads", kill))


def _in_optimizer(kill):
    from megatron_plugin.trainer import loop

    _after(loop, "start", lambda run: _before(run.optimizer, "step", kill))


def _inside_optimizer(kill):
    """This rank's shard is stepped, and nobody has been told."""
    from megatron_plugin.trainer import loop

    def hook(run):
        part = getattr(run.optimizer, "chained_optimizers", [run.optimizer])[0]
        _after(part.optimizer, "step", lambda _: kill())

    _after(loop, "start", hook)


def _in_schedule(kill):
    from megatron_plugin.trainer import loop

    _after(loop, "start", lambda run: _before(run.scheduler, "step", kill))


def _in_evaluation(kill):
    from megatron_plugin.trainer import supervised

    _after(supervised, "nll", lambda _: kill())


def _in_save(kill):
    from megatron_plugin.trainer.saving import Saver

    _before(Saver, "_complete", kill)


POINTS = {
    "data": _in_data, "forward": _in_forward, "backward": _in_backward, "collective": _in_collective, "gradients": _in_gradients,
    "optimizer": _in_optimizer, "inside optimizer": _inside_optimizer, "schedule": _in_schedule, "evaluation": _in_evaluation, "save": _in_save,
}  # fmt: skip


def _record(folder: Path) -> None:
    from megatron_plugin.trainer.metrics import RunLog

    original, path = RunLog.step, folder / f"rank{os.environ['RANK']}.jsonl"

    def step(self, step, metrics, *, show):
        line = {"step": step, "at": time.time(), "pid": os.getpid()} | {name: metrics.get(f"train/{name}") for name in ("loss", "grad_norm")}
        line["hash"] = state_hash(RUN[0])
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return original(self, step, metrics, show=show)

    RunLog.step = step


def state_hash(run) -> str:
    """Of every weight and of the optimizer's state on this rank."""
    found = hashlib.sha256()
    for chunk in run.chunks:
        for name, weight in sorted(chunk.module.named_parameters()):
            found.update(name.encode() + weight.detach().contiguous().numpy().tobytes())
    for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for state in part.optimizer.state.values():
            for name in sorted(state):
                found.update(name.encode() + state[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
