"""`megatron-plugin doctor`: what is installed here, what of it is used, what is broken and how to mend it; with --data, the same of data files.

Last, what can be done here: a line for each feature, with what is missing for it.  With --config or --tokenizer also whether the vocabulary fits.

Three kinds of lines: "ok", "note" (something is missing or idle that is not needed) and "BROKEN".  Nothing is changed, except that the C++
kernels are compiled if they were not yet.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from megatron_plugin.cli.features import rows

if TYPE_CHECKING:
    from megatron_plugin.config import Config

__all__ = ["BrokenError", "Finding", "examine", "report", "report_data", "report_vocabulary"]

SUPPORTED = ((0, 14), (0, 19))
"""Minor versions of megatron-core, first and last: hooks/VERSIONS.md."""
OLDEST_TORCH = (2, 6)
OPTIONAL = {
    "transformers": "tokenizers of Hugging Face models, in the trainer",
    "tokenizers": "the byte-level BPE, in the trainer",
    "safetensors": "weights of Hugging Face models",
    "matplotlib": "curves.png",
    "tensorboard": "tensorboard/ of a run",
    "vllm": "rollouts",
    "megatron.bridge": "its weight conversion instead of ours",
}
"""Modules, and what they are for."""


class BrokenError(RuntimeError):
    """Something that is installed does not work."""

    exit_code = 2


class Finding(NamedTuple):
    """One line of the report."""

    state: str
    """ok, note or BROKEN."""
    what: str
    text: str


def report() -> None:
    """Prints what `examine` finds.  BrokenError, exit code 2, when something is broken."""
    broken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's page about what is not installed: our lines say it shorter
        for finding in examine():
            print(f"{finding.state:<7} {finding.what:<27} {finding.text}", flush=True)
            broken += [finding.what] if finding.state == "BROKEN" else []
    if broken:
        raise BrokenError(f"broken here: {', '.join(broken)}; the lines above say what to do")


def report_vocabulary(tokenizer: str, config: Config | None) -> None:
    """Prints whether a tokenizer, and the model of a configuration, go together.  BrokenError, exit code 2, where they do not."""
    from megatron_plugin.cli.vocabulary import vocabulary_lines

    print(f"{tokenizer}: tokenizer", flush=True)
    wrong = 0
    for good, text in vocabulary_lines(tokenizer, config):
        print(f"  {'ok' if good else 'BROKEN':<7} {text}", flush=True)
        wrong += not good
    if wrong:
        raise BrokenError(f"{tokenizer}: {wrong} of the lines above say BROKEN, and what to do")


def report_data(files: Sequence[str], *, tokenizer: str, seq_length: int, train_on: str, shown: int) -> None:
    """Prints what data/scan.py finds in each file.  DataError, exit code 4, when a line or a file is bad.

    tokenizer: a directory, which makes each line be tokenised too, and compared with seq_length (0: any length); empty: only read."""
    from megatron_plugin.data import ConversationEncoder, DataError, load_tokenizer
    from megatron_plugin.data.scan import scan_file

    encoder = ConversationEncoder(load_tokenizer(tokenizer)) if tokenizer else None
    lines = bad = unreadable = 0
    for file in files:
        scan = scan_file(file, train_on=train_on, encoder=encoder, seq_length=seq_length, shown=shown)
        for line in scan.report():
            print(line, flush=True)
        lines, bad, unreadable = lines + scan.lines, bad + sum(scan.bad.values()), unreadable + (scan.problem is not None)
    if encoder is None:
        print("control tokens in the text, lengths in tokens: not checked without --tokenizer", flush=True)
    if unreadable:
        raise DataError(f"{unreadable} of {len(files)} files cannot be read, {bad} of {lines} lines of the others are bad: see above")
    if bad:
        raise DataError(f"{bad} of {lines} lines are bad: the lines above say which and why; training stops at them, or with data.on_bad_line=skip "
                        "leaves out up to the share data.max_bad_fraction")  # fmt: skip


def examine() -> Iterator[Finding]:
    """Findings, in the order in which they depend on each other."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}")
    yield from _torch()
    if importlib.util.find_spec("torch") is None:
        return
    yield from _devices()
    yield from _backends()
    usable = True
    for finding in _accelerators():
        usable &= finding.state != "BROKEN"
        yield finding
    yield from _megatron_core(usable)
    yield from _optional()
    for row in rows():
        yield Finding("ok" if row.text.startswith("yes") else "note", f"for {row.name}", row.text)


def _torch() -> Iterator[Finding]:
    found = _version("torch")
    if not found:
        yield Finding("BROKEN", "torch", "got none, expected 2.6 or newer: pip install torch")
        return
    import torch

    builds = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    old = _minor(found) < OLDEST_TORCH
    yield Finding("BROKEN" if old else "ok", "torch", f"{found}, {builds}" + ("; expected 2.6 or newer" if old else ""))
    if triton := _version("triton"):
        yield Finding("ok", "triton", triton)
    else:
        needed = torch.cuda.is_available()
        yield Finding("BROKEN" if needed else "note", "triton", "not installed; the kernels on a GPU need it (it comes with torch's CUDA builds)")


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        state, why = ("BROKEN", "torch is built for CUDA and finds no driver or GPU") if torch.version.cuda else ("note", "none: CPU and gloo")
        yield Finding("note" if shutil.which("nvidia-smi") is None else state, "GPU", why)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}", f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB")
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        yield Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("note", "NCCL", "not used without a GPU" if torch.distributed.is_nccl_available() else "not in this build of torch: gloo")


def _backends() -> Iterator[Finding]:
    """Which row kernels run where; the C++ ones are compiled now if there is no cached object."""
    import torch

    from megatron_plugin.kernels import build, cpu
    from megatron_plugin.kernels.backend import select

    command = build.compiler()[0]
    path = shutil.which(command)
    missing = f"'{command}' not found: install one, or name it in CXX; without it CPU tensors go slower"
    yield Finding("ok" if path else "note", "C++ compiler", path or missing)
    in_use = f"on CPU tensors: {select(torch.zeros(1))}"
    if torch.cuda.is_available():
        in_use += f"; on CUDA tensors: {select(torch.zeros(1, device='cuda'))}"
    yield Finding("ok" if cpu.available() else "note", "kernels", in_use)


def _accelerators() -> Iterator[Finding]:
    from megatron_plugin.hooks.accelerators import apex, transformer_engine

    states = {"works": "ok", "breaks": "BROKEN"}
    te = transformer_engine()
    for package in (te, apex(te_works=te.state == "works")):
        text = " ".join(filter(None, (package.version, package.state))) + (f": {package.problem}" if package.problem else "")
        yield Finding(states.get(package.state, "note"), package.name, text + (", not needed" if package.state == "absent" else ""))


def _megatron_core(importable: bool) -> Iterator[Finding]:
    if not _there("megatron.core"):
        text = "not installed; the ops work without it, the trainer and the hooks need it: pip install megatron-core psutil"
        yield Finding("note", "megatron-core", text)
        return
    found = _version("megatron-core")
    if not importable:
        yield Finding("BROKEN", "megatron-core", f"{found or 'there'}, but cannot be used: see above")
        return
    first, last = (".".join(map(str, bound)) for bound in SUPPORTED)
    try:
        from megatron_plugin.hooks.accelerators import megatron_core_version, start_up_line
        from megatron_plugin.hooks.mcore import check_megatron_core

        found = megatron_core_version()
        check_megatron_core()
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield Finding("BROKEN", "megatron-core", f"{found}: {got}; expected {first} to {last}")
        return
    known = SUPPORTED[0] <= _minor(found) <= SUPPORTED[1]
    doubt = "" if known else f": takes our calls, but expected {first} to {last}, all that was run"
    yield Finding("ok" if known else "note", "megatron-core", found + doubt)
    yield Finding("ok", "megatron-core uses", start_up_line())
    if not _there("psutil"):
        yield Finding("BROKEN", "psutil", "not installed: megatron-core's checkpoint writer hangs for ever without it: pip install psutil")


def _optional() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        there = _there(name)
        yield Finding("ok" if there else "note", name, (_version(name.replace(".", "-")) or "there") if there else f"not installed: {purpose}")


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split(".")[:2])
