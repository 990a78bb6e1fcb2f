"""python -m megatron_plugin: the command, also to the processes that a library spawns of it (tests/test_cli.py has the same for -m megatron_plugin.cli)."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPAWNING = """
import multiprocessing, os, runpy, signal, sys, types
loop = types.ModuleType("megatron_plugin.trainer.loop")
def train(config):
    queue = multiprocessing.get_context("spawn").Manager().Queue()
    open("child", "w").write(str(multiprocessing.active_children()[0].pid))
    os.kill(os.getpid(), signal.SIGKILL)
loop.train = train
sys.modules[loop.__name__] = loop
sys.argv = ["x", "train", {config!r}]
runpy.run_module("megatron_plugin", run_name="__main__", alter_sys=True)
"""


def test_what_is_spawned_of_it_ends_with_it(tmp_path):
    (tmp_path / "spawning.py").write_text(SPAWNING.format(config=str(ROOT / "configs/debug_cpu.yaml")))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "spawning.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr[-2000:]
    child, deadline = Path("/proc", (tmp_path / "child").read_text()), time.monotonic() + 20
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()
