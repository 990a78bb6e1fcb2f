"""The losses under every supported megatron-core, and inside the frameworks that import on a CPU; keeps the tables of hooks/VERSIONS.md.

    make test-versions                                   # everything, with the tables
    .venv/bin/python tests/versions/run.py 0.14.0 verl   # or bridge: some of it, printed only

tests/wheels.py fetches what is not installed.  Each runs in processes of its own, with a timeout.  Exit code 1 when a check fails.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.wheels import CACHE, VERL, fetch_megatron, fetch_packages

ROOT = Path(__file__).parents[2]
HERE, PAGE = ROOT / "tests/versions", ROOT / "megatron_plugin/hooks/VERSIONS.md"
MEGATRON = ("0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
BRIDGE = "megatron-bridge==0.3.1"
TIMEOUT_S = 400
SMALL = (
    "--tensor-model-parallel-size 2 --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 10 --lr 1e-3 --min-lr 1e-4 --calculate-per-token-loss --use-cpu-initialization "
    "--distributed-backend gloo --transformer-impl local --attention-backend unfused --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --tokenizer-type NullTokenizer --vocab-size 37 --mock-data --hidden-dropout 0 --attention-dropout 0 "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-rope-fusion "
    "--no-persist-layer-norm --eval-iters 1 --eval-interval 1000"
).split()


def run(script: str, first: Path | None, *arguments: str, ranks: int = 2) -> dict[str, str]:
    """What the script prints as its last line, {check: outcome}; {"it runs": why not} when it does not get so far."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    path = os.pathsep.join(map(str, filter(None, (first, ROOT))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run([sys.executable, *launch, str(HERE / script), *arguments], env=environment, capture_output=True, text=True,
                              timeout=TIMEOUT_S, cwd=ROOT)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"it runs": f"no end after {TIMEOUT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"version"')]
    if done.returncode or not lines:
        if "cannot import name 'override' from 'typing'" in done.stderr:
            return {"it runs": "not run: its megatron.training needs Python 3.12"}
        print(done.stderr[-6000:], file=sys.stderr)
        errors = [line for line in done.stderr.splitlines() if "Error: " in line and "ChildFailedError" not in line]
        return {"it runs": (errors or ["exit code " + str(done.returncode)])[0][:200]}
    return json.loads(lines[-1])


def megatron_lm(first: Path | None) -> dict[str, str]:
    """Megatron-LM's training loop; {} for wheels without it."""
    if first is None or not (first / "megatron/training").is_dir():
        return {}
    configs = CACHE / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    (configs / "dft.yaml").write_text("loss: {name: dft}\n")
    (configs / "one_pass.yaml").write_text("loss: {name: dft}\none_pass: true\n")
    return run("megatron_lm.py", first, "--plugin-config", str(configs / "dft.yaml"), *SMALL)


def main(chosen: list[str]) -> int:
    CACHE.mkdir(parents=True, exist_ok=True)
    core, lm, verl, bridge = {}, {}, {}, {}
    for number in MEGATRON:
        if chosen and number not in chosen:
            continue
        core[number] = run("parity.py", first := fetch_megatron(number))
        if core[number].pop("version", number).split("+")[0] != number:  # from 0.18 on it ends in the commit of the git tree around it
            core[number] = {"it runs": "another version was imported"}
        _say(f"megatron-core {number}", core[number])
        if found := megatron_lm(first):
            lm[number] = found
            found.pop("version", None)
            _say(f"Megatron-LM {number}", found)
    if not chosen or "verl" in chosen:
        verl[VERL[0].replace("==", " ")] = found = run("verl_losses.py", fetch_packages(*VERL), ranks=1)
        found.pop("version", None)
        _say("verl", found)
    if not chosen or "bridge" in chosen:
        bridge[BRIDGE.replace("==", " ")] = found = run("bridge_loss.py", None, str(fetch_packages(BRIDGE)))
        found.pop("version", None)
        _say("Megatron-Bridge", found)
    outcomes = [outcome for table in (core, lm, verl, bridge) for column in table.values() for outcome in column.values()]
    if not chosen:
        _keep(core, lm, verl, bridge)
    return 0 if all(outcome.startswith(("ok", "not run")) for outcome in outcomes) else 1


def _say(name: str, outcomes: dict[str, str]) -> None:
    for check, outcome in outcomes.items():
        print(f"{name:<22} {check:<44} {outcome}", flush=True)


def _keep(*tables: dict[str, dict[str, str]]) -> None:
    """Puts the tables between the marks of the page."""
    begin, end = "<!-- made by tests/versions/run.py -->\n", "<!-- end -->\n"
    before, _, rest = PAGE.read_text().partition(begin)
    made = f"Run on {datetime.date.today()}: Python {platform.python_version()}, torch {version('torch')}, gloo, CPU; `make test-versions`.\n"
    titles = ("megatron-core", "Megatron-LM's train_step and evaluate, of the same wheel, TP2", "verl", "Megatron-Bridge, its loss function alone, TP2")
    for title, table in zip(titles, tables, strict=True):
        checks = list(dict.fromkeys(check for column in table.values() for check in column))
        rows = [[check, *(column.get(check, "-") for column in table.values())] for check in checks]
        made += f"\n| {title} | {' | '.join(table)} |\n|---|{'---|' * len(table)}\n"
        made += "".join(f"| {' | '.join(row)} |\n" for row in rows)
    PAGE.write_text(before + begin + made + end + rest.partition(end)[2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
