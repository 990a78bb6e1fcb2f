"""Damaged lines: each is named as file:line: reason, by training and by the doctor alike, and no good line is lost with it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import re
import threading
import time
import tracemalloc
from functools import partial
from pathlib import Path
from unittest import mock

from megatron_plugin import cli
from megatron_plugin.data import BadLines, DataError, iter_lines, lines, load_rows, load_tokenizer, read_conversations, train_tokenizer
from megatron_plugin.data.scan import scan_file
from tests.data.samples import GSM8K, TEXTS
from tests.faults.damage import KINDS, ROW, Damage, dumped, talk
from tests.faults.promises import Case

PROMISE = "damaged data: every line is named `file:line: reason` by training and doctor alike, 17 kinds x 50, and no other is lost; 20,000 lines/s"
EACH, GOOD = 50, 100
LINES_PER_S = 20_000
LONGEST = 8192  # bytes, in place of the product's 64 MiB


def write(path: Path, damage: Damage, seed: int) -> list[int]:
    """150 lines, 50 of them damaged; the numbers of those."""
    shuffled = random.Random(seed)
    numbers = sorted(shuffled.sample(range(2, GOOD + EACH + 1), EACH))
    written = []
    for number in range(1, GOOD + EACH + 1):
        record = GSM8K[number % len(GSM8K)]
        written.append(damage(record, shuffled) if number in numbers else dumped(record))
    path.write_bytes(b"\n".join(written) + b"\n")
    return numbers


def tokenizer(folder: Path) -> Path:
    train_tokenizer(TEXTS, folder / "tokenizer", vocab_size=300)
    return folder / "tokenizer"


def doctor(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of the command."""
    with mock.patch.dict(os.environ), contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        os.environ.pop("RANK", None)
        return cli.main(["doctor", "--data", *arguments]), out.getvalue()


def damaged(kind: str, folder: Path, seed: int = 0) -> None:
    damage, reason = KINDS[kind]
    path = folder / "damaged.jsonl"
    numbers = write(path, damage, seed)
    words = tokenizer(folder)
    limit = 2**20 if kind == "nested too deep" else LONGEST
    with mock.patch.object(lines, "LONGEST_LINE", limit):
        ledger = BadLines("skip", max_bad_fraction=1.0)
        rows = load_rows(path, load_tokenizer(words), ROW, bad_lines=ledger)
        trained = [f"{error.source}: {error.reason}" for error in ledger.errors]
        code, out = doctor(str(path), "--tokenizer", str(words), "--seq-length", str(ROW), "--show", "1000")
        told = [line for line in out.splitlines() if line.startswith(f"{path}:") and re.match(r"\d+: ", line[len(str(path)) + 1 :])]
        for policy in (BadLines(), BadLines("skip", max_bad_fraction=(EACH - 1) / (GOOD + EACH))):
            try:
                load_rows(path, load_tokenizer(words), ROW, bad_lines=policy)
                raise AssertionError(f"{policy.on_bad_line} lets 50 bad lines of 150 through")
            except DataError as error:
                assert str(error).startswith(f"{path}:{numbers[0]}: "), error
    assert sorted(trained, key=place) == sorted(told, key=place), "doctor and training disagree"
    assert [place(line) for line in sorted(trained, key=place)] == numbers, "other lines than the damaged ones"
    assert all(re.search(reason, line) for line in trained), [line for line in trained if not re.search(reason, line)][:3]
    assert code == 4 and rows.report.samples == GOOD and sum(ledger.by_kind().values()) == EACH and ledger.lines == GOOD + EACH
    assert sum(len(rows.sources(row)) for row in range(len(rows))) == GOOD


def place(line: str) -> int:
    """The number in "file:number: reason"."""
    return int(re.match(r".*?\.jsonl:(\d+): ", line).group(1))


def no_newline(folder: Path) -> None:
    """A line of which no end comes is not read into memory, and the lines behind it keep their numbers."""
    path, good = folder / "x.jsonl", dumped(GSM8K[0])
    path.write_bytes(good + b"\n" + b"1" * 3_000_000 + b"\n" + good + b"\n" + b"[" * 100_000)
    with mock.patch.object(lines, "LONGEST_LINE", LONGEST), mock.patch.object(lines, "BLOCK", 4096):
        tracemalloc.start()
        found = list(iter_lines(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert [str(item) for item in found if isinstance(item, DataError)] == [
        f"{path}:{number}: line too long (got {size} bytes, expected at most {LONGEST}): is a newline missing?" for number, size in ((2, 3_000_001), (4, 100_000))
    ] and len(found) == 4
    assert peak < 500_000, f"{peak} bytes for lines of up to 3 MB"


def other_files(folder: Path) -> None:
    """What is no jsonl at all: said at once and in words."""
    (folder / "empty").write_bytes(b"")
    (folder / "x.gz").write_bytes(gzip.compress(dumped(GSM8K[0])))
    (folder / "utf16").write_text(json.dumps(GSM8K[0]), "utf-16")
    (folder / "pickle").write_bytes(b"\x80\x04K\x01.")
    (folder / "parquet").write_bytes(b"PAR1" + b"\0" * 50)
    os.mkfifo(folder / "fifo")
    expected = {"empty": "empty file|no usable line", "x.gz": "gzip: unpack it with gunzip", "utf16": "UTF-16", "pickle": "Python pickle", "parquet": "Parquet",
                "fifo": "got a pipe or device", "": "Is a directory", "none": "No such file"}  # fmt: skip
    paths = {folder / name: reason for name, reason in expected.items()} | {
        Path("/dev/zero"): "got a pipe or device", Path("/proc/self/mem"): "Input/output error"}  # fmt: skip
    for path, reason in paths.items():
        said = []
        thread = threading.Thread(target=_read, args=(path, said), daemon=True)
        thread.start()
        thread.join(20)
        assert len(said) == 2 and all(re.search(reason, text) for text in said), (path, said)


def _read(path: Path, said: list[str]) -> None:
    try:
        read_conversations(path)
    except DataError as error:
        said.append(str(error))
    said.append(str(scan_file(path).problem))


def fast(folder: Path) -> None:
    """Lines a second of CPU time, without tokenising."""
    path = folder / "many.jsonl"
    path.write_bytes(b"".join(dumped(talk(GSM8K[i % 3], content=f"{i} {GSM8K[i % 3]['answer'] * 2}")) + b"\n" for i in range(40_000)))
    begin = time.process_time()
    scan = scan_file(path)
    rate = scan.lines / (time.process_time() - begin)
    assert scan.good == 40_000 and rate >= LINES_PER_S, f"{rate:.0f} lines a second, expected {LINES_PER_S}"


def once_in_memory(folder: Path) -> None:
    """Reading holds what it returns and a line, not the file beside it."""
    path = folder / "many.jsonl"
    path.write_bytes(b"".join(dumped({"prompt": f"{i}", "response": f"{i} " * 300}) + b"\n" for i in range(2_000)))
    tracemalloc.start()
    kept = read_conversations(path)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 2_000 and peak - now < 0.1 * path.stat().st_size, (now, peak, path.stat().st_size)


def cases(*, full: bool) -> list[Case]:
    each = [Case(kind, partial(damaged, kind), tries=EACH) for kind in KINDS]
    return [*each, Case("no newline", no_newline, tries=2), Case("other files", other_files, tries=10), Case("speed", fast), Case("memory", once_in_memory)]
