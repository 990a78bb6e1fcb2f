"""The lines of a data file as bytes, each with its number, whatever the file holds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_plugin.data.errors import DataError

__all__ = ["LONGEST_LINE", "numbered_lines"]

LONGEST_LINE = 2**26
"""Bytes.  A file without a newline would be read into memory in one piece; 64 MiB are some 16 million tokens, in one conversation."""
BLOCK = 2**20
OTHER_FORMATS = {
    b"\x1f\x8b": "gzip: unpack it with gunzip", b"\x28\xb5\x2f\xfd": "zstd: unpack it with unzstd", b"\xfd7zXZ": "xz: unpack it with unxz",
    b"BZh": "bzip2: unpack it with bunzip2", b"PK\x03\x04": "zip: unpack it with unzip", b"PAR1": "Parquet: write it as jsonl",
    b"\x80": "a Python pickle, which could run code and is never read: write it as jsonl",
    b"\xff\xfe": "UTF-16: iconv -f UTF-16 -t UTF-8", b"\xfe\xff": "UTF-16: iconv -f UTF-16 -t UTF-8",
}  # fmt: skip
"""First bytes, none of which UTF-8 JSON can begin with -> what the file is, and the way out."""


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes | DataError]]:
    """(1, b"...") and so on, without line ends and without a byte order mark; a line above LONGEST_LINE is a DataError in its place.

    One line is in memory at a time.  DataError (raised) for what is no readable text file: a directory, a pipe, compressed or binary data."""
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise DataError("cannot read the data: got a pipe or device, expected a regular file: every rank reads it, and opening an empty pipe "
                            "never ends; write it to a file first", str(path))  # fmt: skip
        with open(path, "rb") as file:  # bytes: one undecodable line must not hide the others, and only \n may end a line
            head = file.peek(8)[:8]
            for magic, what in OTHER_FORMATS.items():
                if head.startswith(magic):
                    raise DataError(f"cannot read the data: got {what}; expected one JSON object per line, in UTF-8", str(path))
            yield from _lines(file, str(path))
    except OSError as error:  # also in the midst of the file
        raise DataError(f"cannot read the data: {error.strerror}; expected a jsonl file", str(path)) from error


def _lines(file, path: str) -> Iterator[tuple[int, bytes | DataError]]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            size = len(line)
            while (more := file.readline(BLOCK)) and not more.endswith(b"\n"):
                size += len(more)
            size += len(more)
            what = f"line too long (got {size} bytes, expected at most {LONGEST_LINE}): is a newline missing?"
            yield number, DataError(what, f"{path}:{number}")
            continue
        line = line.rstrip(b"\r\n")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte order mark, as Windows editors write it
