"""The losses under every supported megatron-core, and inside the frameworks that import on a CPU; keeps the tables of hooks/VERSIONS.md.

    make test-versions                                   # everything, with the tables
    .venv/bin/python tests/versions/run.py 0.14.0 verl   # or bridge: some of it, printed only

Wheels come from the package index into build/versions/ and are unpacked, not installed: they are Python, but for one library that is not
needed, so those for Python 3.12 run on 3.11 too.  Each runs in processes of its own, with a timeout.  Exit code 1 when a check fails.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE, CACHE, PAGE = ROOT / "tests/versions", ROOT / "build/versions", ROOT / "megatron_plugin/hooks/VERSIONS.md"
INSTALLED = version("megatron-core")
MEGATRON = ("0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
VERL = ("verl==0.9.1", "tensordict==0.15.3", "ray==2.60.0", "msgpack==1.2.4", "pyvers==0.2.3", "codetiming==1.4.0", "orjson==3.13.0")
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


def fetch(number: str) -> Path | None:
    """The unpacked wheel of a megatron-core; None for the one that is installed."""
    if number == INSTALLED:
        return None
    folder = CACHE / f"megatron-core-{number}"
    if not folder.exists():
        wheels = CACHE / "wheels"
        platforms = [f"--platform=manylinux_2_{minor}_{platform.machine()}" for minor in (24, 28)]
        _pip("download", "--no-deps", "--only-binary=:all:", "--python-version=3.12", *platforms, f"--dest={wheels}", f"megatron-core=={number}")
        with zipfile.ZipFile(next(wheels.glob(f"megatron_core-{number}-*.whl"))) as wheel:
            wheel.extractall(unfinished := folder.with_suffix(".part"))
        unfinished.rename(folder)
    return folder


def fetch_packages(*packages: str) -> Path:
    """A folder with them in it, without what they depend on."""
    folder = CACHE / packages[0].replace("==", "-")
    if not folder.exists():
        _pip("install", "--no-deps", f"--target={folder}.part", *packages)
        shutil.rmtree(f"{folder}.part/tests", ignore_errors=True)  # verl brings a package of that name, which would hide ours
        Path(f"{folder}.part").rename(folder)
    return folder


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True, timeout=600)


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
        core[number] = run("parity.py", first := fetch(number))
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
