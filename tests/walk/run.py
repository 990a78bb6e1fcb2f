"""The README and the pages, typed in from top to bottom: every command is run as printed, each page in a folder of its own, with fewer steps and samples where that is
all it changes.

    make test-commands                       all of them, about ten minutes; ends with 1 if one fails
    python -m tests.walk.run README.md       those of one page

test_commands.py sees to it that no command is left out without a reason (ELSEWHERE).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_plugin.data import generate, train_tokenizer, true_vocab_size
from tests.rollout.vllm_models import make_model
from tests.walk.commands import ROOT, Command, every_command

TIMEOUT_S = 400
FIRST = re.compile(r"train configs/sft\.yaml")  # the pages' own order is by subject; all others start from its weights
SMALLER = (  # what a command matches -> what is typed behind it
    (r" train configs/(chord|grpo|srft)\.yaml", "train.steps=2 train.warmup_steps=0 rollout.prompts=4 rollout.n=2 rollout.max_tokens=16 train.eval_interval=0 data.eval_samples=2"),
    (r" train (?!configs/sft|my\.yaml)(?!.*--smoke)", "train.steps=4 train.warmup_steps=0 train.eval_interval=0 data.eval_answers=0"),
    (r"megatron-plugin eval ", "--samples 4 --n 2 --max-tokens 32"),
    (r"megatron-plugin realign ", "--samples 24 --max-tokens 40"),
)
ELSEWHERE = {  # the beginning of a command -> where it is run, or why nowhere
    "make test-commands": "this",
    "make test": "continuous integration; test-faults, test-parity, test-versions and test-mutants by hand, each with its page",
    "make demo": "by hand, each with a page in benchmarks/results",
    "make dynamics": "by hand: hours; docs/replication.md is its page",
    "python -m benchmarks.dynamics": "the same; tests/test_dynamics.py runs the studies' parts",
    "python -m benchmarks.cpu": "by hand: six minutes, with a page in benchmarks/results",
    "python -m benchmarks.page results/<file>.json": "tests/benchmarks, with a file",
    "pip install": "tests/packaging installs wheel and source distribution; .ci/run installs the lock",
    "pip download": "needs the registry",
    "source ": "what is run here is run with the same programs first in PATH",
    "torchrun --nnodes 2": "tests/multi_node/test_two_hosts.py, on two network namespaces",
    "torchrun ... -m megatron_plugin.cli train configs/chord.yaml run_dir=/shared": "tests/multi_node/test_server_elsewhere.py",
    "megatron-plugin serve /shared": "the same",
}


def elsewhere(command: Command) -> str:
    """Where it is run instead of here; "" for a command that is run here."""
    return next((why for begin, why in ELSEWHERE.items() if command.text.startswith(begin)), "")


def prepare(folder: Path) -> None:
    """What the commands name: data files, a Hugging Face model, and the configurations."""
    (folder / "configs").symlink_to(ROOT / "configs")
    for seed, name in enumerate(("my", "mine", "data", "heldout")):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate("train", 60, seed)))
    tokenizer = train_tokenizer([(folder / "my.jsonl").read_text()], folder / "Qwen3-8B", vocab_size=300)
    make_model(folder / "Qwen3-8B", "qwen3", vocab_size=true_vocab_size(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder / "Qwen3-8B")


def typed(command: Command) -> str:
    more = next((more for pattern, more in SMALLER if re.search(pattern, command.text)), "")
    return f"{command.text} {more}".strip()


def execute(text: str, folder: Path) -> tuple[bool, str]:
    """(whether it did what it should, what it said).  A server is asked to end once it is ready."""
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "said.txt", "w+") as said:
        job = subprocess.Popen(["bash", "-c", f"exec {text}"], cwd=folder, env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        deadline, serves, ready = time.monotonic() + TIMEOUT_S, " serve " in text, False
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if serves and not ready and "ready after" in (folder / "said.txt").read_text():
                ready = True
                job.send_signal(signal.SIGINT)
        late = job.poll() is None
        if late:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    fine = not late and (ready if serves else job.returncode == 0)
    return fine, (folder / "said.txt").read_text(errors="replace")


def main(pages: list[str]) -> int:
    commands = [c for c in every_command() if (not pages or c.page in pages) and not elsewhere(c)]
    failed = sum(walk([c for c in commands if c.page == page]) for page in dict.fromkeys(c.page for c in commands))
    print(f"{len(commands)} commands, {failed} failed")
    return int(failed > 0)


def walk(commands: list[Command]) -> int:
    """Those of one page; how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="walk-") as name:
        prepare(Path(name))
        for command in sorted(commands, key=lambda command: not FIRST.search(command.text)):  # stable
            begin = time.perf_counter()
            fine, said = execute(typed(command), Path(name))
            failed += not fine
            print(f"{'ok    ' if fine else 'FAILED'} {time.perf_counter() - begin:6.1f} s  {command.page}:{command.line}: {typed(command)}", flush=True)
            if not fine:
                print("\n".join(f"    {line}" for line in said.splitlines()[-25:]), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
