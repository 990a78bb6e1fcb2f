"""From result files to one page: `python -m benchmarks.page runs/*.json --into benchmarks/results` writes <date>-<gpu>.{json,md,png} there.

With one JSON and no --into, the page beside it is written again.  The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import targets


def merge(documents: list[dict]) -> dict:
    """One document of several runs."""
    return {"runs": [run for d in documents for run in d["runs"]], "rows": [row for d in documents for row in d["rows"]],
            "notes": [note for d in documents for note in d.get("notes", [])]}  # fmt: skip


def _number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent: 0.0123, 1.23, 123, 12300."""
    if value is None:
        return ""
    if value == 0 or value >= 10**digits:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def header(document: dict) -> list[str]:
    run = document["runs"][0]
    changes = {True: ", with uncommitted changes", False: "", None: ", changes unknown"}[run["dirty"]]
    what = run.get("gpu") or run["cpu"]
    lines = [f"# Kernel benchmarks, {run['date'][:10]}, {what}", ""]
    if run.get("tiny"):
        lines += ["**Tiny shapes: this page tests the benchmarks and measures nothing.**", ""]
    lines += [
        f"Commit {run['commit']}{changes}. CPU: {run['cpu']}, {run['cores']} cores, {run['threads']} threads. "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + ".",
        "",
        "Medians of interleaved rounds, 20th and 80th percentile in brackets; ceilings are timed in the same rounds. Every output was compared with",
        "an fp64 truth (hidden-in: fp32 logits) before it was timed; `error` is the largest ||out - truth|| / ||truth|| of its outputs. GB/s and TFLOP/s",
        "count the least work of the task, the same for all, so they compare as times do. Held-out shapes were not looked at while tuning.",
        *["On the CPU freed memory stays with the process (as with jemalloc), or page faults would be most of the time of those who need much."]
        * (run["device"] == "cpu"),
        "",
    ]
    lines += _table(
        ["command", "s", "load before, after"],
        [[f"`{r['command']}`", f"{r.get('seconds', 0):.0f}", f"{r['load_before']}, {r.get('load_after', '')}"] for r in document["runs"]],
    )
    return lines + [""] + [f"{note}\n" for note in document.get("notes", [])]


def _worst(found: tuple | None) -> str:
    return "" if found is None else f"{_number(found[0])} ({found[1]}; {found[2]} shape{'s' * (found[2] > 1)})"


def target_table(document: dict) -> list[str]:
    run = document["runs"][0]
    lines = targets.verdicts(document["rows"], run["device"], tiny=run.get("tiny", False))
    rows = [[x["op"], x["target"], _worst(x["frozen"]), _worst(x["held_out"]), x["verdict"]] for x in lines]
    return ["## Targets", "", *_table(["op", "target", "worst of the frozen shapes", "worst held-out", "verdict"], rows), ""]


def shape_table(rows: dict[str, dict]) -> list[str]:
    """The contenders of one shape; `x ours` is how many times longer than our first row."""
    ours = next((row["ms"] for name, row in rows.items() if name.startswith("ours") and row["ms"]), None)
    keys = [key for key in ("share_copy", "share_read", "share_gemm") if any(key in row for row in rows.values())]
    rate = "tflop_s" if any(row.get("tflop_s") for row in rows.values()) else "gb_s" if any(row.get("gb_s") for row in rows.values()) else None
    extras = [key for key in ("peak_mib", "dropped", "tokens_per_s") if any(row.get(key) is not None for row in rows.values())]
    names = {"gb_s": "GB/s", "tflop_s": "TFLOP/s", "peak_mib": "peak MiB", "dropped": "rows dropped", "tokens_per_s": "tokens/s"}
    head = ["contender", "ms", "x ours", *([names[rate]] if rate else []), *(f"of {key[6:]}" for key in keys), *(names[key] for key in extras), "error", "notes"]
    lines = []
    for name, row in rows.items():
        notes = "; ".join(x for x in (row.get("says"), row.get("reason") and f"**not measured: {row['reason']}**") if x)
        time = f"{_number(row['ms'])} [{_number(row['p20'])}, {_number(row['p80'])}]" if row["ms"] else ""
        error = max(row.get("errors", {}).values(), default=None)
        shares = [f"{row[key]:.0%}" if key in row else "" for key in keys]
        cells = [_number(row.get(key)) if key != "dropped" or row.get(key) is None else f"{row[key]:.1%}" for key in extras]
        lines.append([name, time, _number(row["ms"] / ours) if row["ms"] and ours else "", *([_number(row.get(rate) or None)] if rate else []), *shares, *cells,
                      "" if error is None else f"{error:.1e}", notes])  # fmt: skip
    return _table(head, lines)


def render(document: dict) -> str:
    lines = header(document) + target_table(document)
    claims = {run["benchmark"]: run["claim"] for run in document["runs"]}
    for benchmark, claim in claims.items():
        lines += [f"## {benchmark}", "", claim, ""]
        for shape, rows in targets.by_shape(document["rows"], benchmark).items():
            held_out = ", held out" * next(iter(rows.values()))["held_out"]
            lines += [f"**{shape}**{held_out}", "", *shape_table(rows), ""]
    return "\n".join(lines)


def draw(document: dict, path: Path) -> bool:
    """One panel per benchmark: its first shape, medians with the 20th to 80th percentile.  False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    panels = []
    for benchmark in dict.fromkeys(run["benchmark"] for run in document["runs"]):
        for shape, rows in targets.by_shape(document["rows"], benchmark).items():
            if any(row["ms"] for row in rows.values()):
                panels.append((f"{benchmark}, {shape}", [row for row in rows.values() if row["ms"]]))
                break
    if not panels:
        return False
    heights = [1 + len(rows) for _, rows in panels]
    figure, axes = plt.subplots(len(panels), figsize=(9, 0.26 * sum(heights) + 0.7 * len(panels)), height_ratios=heights, squeeze=False)
    for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
        colours = ["tab:blue" if r["contender"].startswith("ours") else "0.8" if r["contender"].startswith("ceiling") else "tab:orange" for r in rows]
        spread = [[max(0.0, r["ms"] - r["p20"]) for r in rows], [max(0.0, r["p80"] - r["ms"]) for r in rows]]
        axis.barh([r["contender"] for r in rows], [r["ms"] for r in rows], xerr=spread, color=colours, error_kw={"lw": 0.8})
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("ms", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def write(document: dict, out: Path) -> None:
    """<out>.json, <out>.md, <out>.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    base = str(out)  # not with_suffix: a name may hold dots
    Path(base + ".json").write_text(json.dumps(document, indent=1) + "\n")
    text = render(document)
    if draw(document, Path(base + ".png")):
        text += f"\n![first shape of each benchmark]({out.name}.png)\n"
    Path(base + ".md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, help="folder; without it the page lands beside the first input")
    parser.add_argument("--name", help="file name without suffix, instead of <date>-<gpu>")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the page, such as a step that failed")
    arguments = parser.parse_args()
    document = merge([json.loads(path.read_text()) for path in arguments.results])
    document["notes"] += arguments.note
    run = document["runs"][0]
    if arguments.into:
        where = run["gpu"].partition("(")[0].split()[-1].lower() if run.get("gpu") else "cpu-kernels"
        out = arguments.into / (arguments.name or f"{run['date'][:10]}-{where}")
    else:
        out = arguments.results[0].with_suffix("")
    write(document, out)
    for line in targets.verdicts(document["rows"], run["device"], tiny=run.get("tiny", False)):
        print(f"{line['op']:30s} {line['target']:38s} {_worst(line['frozen']):52s} {line['verdict'][:90]}")
    print(f"wrote {out}.md")


if __name__ == "__main__":
    main()
