"""`make demo-realign`: a small model trained here, expert data that it would not write itself, realigned by a live vLLM, and how on-distribution it is then.

    python examples/demo_realign.py [RUN_DIR] [--steps 350] [--samples 200]        # default runs/demo-realign; finished parts are not repeated

Each part is the command a person would type: train, export, realign twice, score three times.

What is built in, so that there is something to see.  The model learns to answer in bare lines ("5+7=12"), half of the time hastily: a line too early,
with a wrong result.  The expert finishes, but begins every line with a word that the model never says of its own accord ("Well 5+7=12").  Shown the
expert's answer the model learnt to say something about it, then "# CoT", and to write a finished answer into which half of the expert's words slip.  So
the hinted stream alone is right and sounds like the expert; the unaided stream is in style and often wrong.  The problems are in no training set.

Both ways draw at the same low temperature, which alone lifts cll a little above that of the expert's text; own answers are greedy, which lifts it more.
What the unaided stream adds to a hinted answer is the row "hinted only" against the hint alone, question by question.
"""

import argparse
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_plugin.data import generate
from megatron_plugin.data.scores import read_scores
from megatron_plugin.rollout.hinted.realign import MARKER, with_answer

ROOT = Path(__file__).parent.parent
PROMPT = f"Say how many steps the reference answer takes and where it ends, write {MARKER}, and solve the question yourself."
WAYS = {"realigned": (), "hint alone": ("--beta", "0", "--unaided", "0")}
TITLES = {"expert": "expert data", "realigned": "realigned", "hint alone": "self-distillation from the hint alone (beta 0)"}


def run(*words: str) -> None:
    print("\n$ python -m " + shlex.join(map(str, words)), flush=True)
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)


def line(messages: list[tuple[str, str]]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}) + "\n"


def train_lines(count: int, seed: int) -> list[str]:
    """Half of them answers to a question, half analyses and answers to a question with the expert's answer."""
    draw = random.Random(seed)
    lines = [line([("user", x["question"]), ("assistant", x["answer"])]) for x in generate("warm", count, seed, largest=10, hasty=0.5)]
    expert, bare = generate("warm", count, seed + 7, largest=10, filler=1.0), generate("warm", count, seed + 7, largest=10)  # the same problems
    for shown, own in zip(expert, bare, strict=True):
        both = zip(shown["answer"].split("\n"), own["answer"].split("\n"), strict=True)
        answer = "\n".join(draw.choice(pair) for pair in both)
        analysis = f"{own['answer'].count(chr(10))} steps to {own['answer'].split('#### ')[1]}.\n{MARKER}\n"
        lines.append(line([("system", PROMPT), ("user", with_answer(shown["question"], shown["answer"])), ("assistant", analysis + answer)]))
    draw.shuffle(lines)
    return lines


def write_data(folder: Path, samples: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = [*generate("heldout", samples // 2, seed + 1, largest=10, filler=1.0), *generate("ood", samples - samples // 2, seed + 1, largest=10, filler=1.0)]
    (folder / "expert.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
    (folder / "train.jsonl").write_text("".join(train_lines(4000, seed)))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(x) + "\n" for x in generate("heldout", 32, seed + 2, largest=10)))
    (folder / "prompt.txt").write_text(PROMPT)


def mean_cll(data: Path, scores: Path) -> dict[str, float]:
    """Mean cll of each sample's answer, by the expert line it is from."""
    sources = [json.loads(text).get("source", f"{data}:{number}") for number, text in enumerate(data.read_text().splitlines(), 1)]
    return {sources[score["line"] - 1]: score["cll"] for score in read_scores(scores / "scores.jsonl") if "cll" in score}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else "too few"


def report(run_dir: Path) -> Table:
    """Mean and standard error over samples.  The last two columns compare sample by sample: the same question in both sets."""
    files = {"expert": run_dir / "data/expert.jsonl", **{way: run_dir / way.replace(" ", "-") / "realigned.jsonl" for way in WAYS}}
    found = {name: mean_cll(path, run_dir / f"score-{name.replace(' ', '-')}") for name, path in files.items()}
    hinted = {x["source"] for x in map(json.loads, files["realigned"].read_text().splitlines()) if x["kind"] == "hinted"}
    found["realigned, hinted only"] = {source: cll for source, cll in found["realigned"].items() if source in hinted}
    found["realigned, own only"] = {source: cll for source, cll in found["realigned"].items() if source not in hinted}
    table = Table(title="mean cll of an answer under the model, nats: mean and standard error over samples")
    for heading in ("", "samples", "mean cll", "minus the expert's, same questions", "minus the hint's alone, same questions"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, cll in found.items():
        pairs = [[cll[source] - other[source] for source in cll if source in other] for other in (found["expert"], found["hint alone"])]
        same = [f"{spread(x)} ({len(x)})" if other != name else "" for other, x in zip(("expert", "hint alone"), pairs, strict=True)]
        table.add_row(TITLES.get(name, name), str(len(cll)), spread(list(cll.values())), *same)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", nargs="?", default="runs/demo-realign", type=Path)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.absolute()
    data, model, hf = run_dir / "data", run_dir / "model", run_dir / "hf"
    write_data(data, arguments.samples, arguments.seed)
    run("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_plugin.cli", "train", "configs/sft.yaml", f"run_dir={model}",
        "parallel.tensor=2", f"train.steps={arguments.steps}", "train.lr=3.0e-3", "train.micro_batch=16", "train.log_interval=50", "checkpoint.interval=0",
        f"data.train={data}/train.jsonl", f"data.eval={data}/heldout.jsonl", "data.seq_length=192", f"seed={arguments.seed}")  # fmt: skip
    if not hf.exists():
        run("megatron_plugin.cli", "export", model, hf)
    for way, options in WAYS.items():
        out = run_dir / way.replace(" ", "-")
        run("megatron_plugin.cli", "realign", data / "expert.jsonl", hf, "--out", out, "--splitter", "####", "--max-tokens", 64, "--analysis-prompt",
            data / "prompt.txt", *options)  # fmt: skip
        run("megatron_plugin.cli", "score", out / "realigned.jsonl", model, "--out", run_dir / f"score-{out.name}")
    run("megatron_plugin.cli", "score", data / "expert.jsonl", model, "--out", run_dir / "score-expert")
    Console(width=150).print(table := report(run_dir))
    with (run_dir / "cll.txt").open("w") as file:
        Console(width=150, file=file).print(table)
    print(f"table: {run_dir}/cll.txt   pages: {run_dir}/score-*/report.md")


if __name__ == "__main__":
    main()
