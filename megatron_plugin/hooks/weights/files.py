"""A Hugging Face directory of safetensors: read slice by slice, written file by file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_plugin.hooks.weights.errors import WeightsError

__all__ = ["TOKENIZER_FILES", "HFReader", "HFWriter", "copy_files"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = ("F64", "F32", "F16", "BF16")  # others are quantised: their values are not the weights
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip


class HFReader:
    """The tensors of a directory.  Opening reads headers only; `read` takes from disk what is asked for."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of = self._find()
        self._open = {}
        for file in sorted(set(self._file_of.values())):
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{file}: got a file that cannot be read ({error}), expected safetensors; is the download complete?") from error
        self.bytes_read = 0

    def _find(self) -> dict[str, Path]:
        """{tensor: file} from the index, or from the headers where there is none."""
        index = self.directory / INDEX
        if index.is_file():
            try:
                return {name: self.directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise WeightsError(f"{index}: got no weight_map ({error!r}), expected the index of a sharded model") from error
        files = [self.directory / SINGLE] if (self.directory / SINGLE).is_file() else sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{self.directory}: got no safetensors files, expected {SINGLE} or {INDEX}; convert .bin files with transformers' "
                               "save_pretrained")  # fmt: skip
        found: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    found |= dict.fromkeys(opened.keys(), file)
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{file}: got a file that cannot be read ({error}), expected safetensors; is the download complete?") from error
        return found

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._file_of)

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """WeightsError naming tensor and file unless the directory has exactly the `expected` tensors, in these shapes.

        Unexpected ones whose name ends in one of `ignored` are left alone."""
        if missing := [name for name in expected if name not in self._file_of]:
            raise WeightsError(f"{self.directory}: got no tensor {missing[0]}{_more(missing)}, expected it from config.json; is it all there?")
        for name, shape in expected.items():
            file = self._file_of[name]
            try:
                found = self._open[file].get_slice(name)
            except SafetensorError as error:
                raise WeightsError(f"{file}: got no tensor {name}, expected it there from {INDEX}") from error
            if tuple(found.get_shape()) != shape:
                raise WeightsError(f"{file}: {name}: got a shape of {tuple(found.get_shape())}, expected {shape} from config.json")
            if found.get_dtype() not in DTYPES:
                raise WeightsError(f"{file}: {name}: got dtype {found.get_dtype()}, expected one of {', '.join(DTYPES)}; dequantise the model first")
        unexpected = [name for name in self._file_of if name not in expected and not name.endswith(tuple(ignored))]
        if unexpected:
            raise WeightsError(f"{self._file_of[unexpected[0]]}: got the tensor {unexpected[0]}{_more(unexpected)}, expected none of that name "
                               "from config.json; it would be lost")  # fmt: skip

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Indices [start, stop) along `axis`, on the CPU, in the file's dtype."""
        part = self._open[self._file_of[name]].get_slice(name)
        tensor = part[start:stop] if axis == 0 else part[:, start:stop]
        self.bytes_read += tensor.nbytes
        return tensor


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


class HFWriter:
    """Writes tensors, handed over one by one in the order of `sizes`, into files of at most `file_bytes` (a larger tensor has its own).

    Memory: one file's tensors.  Nothing appears under `directory` before `close`."""

    def __init__(self, directory: str | Path, sizes: Mapping[str, int], file_bytes: int) -> None:
        """`sizes`: {tensor: bytes}.  WeightsError when `directory` has something in it."""
        self.directory = Path(directory)
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise WeightsError(f"got {self.directory}, which is not empty, expected a directory to be made: choose another")
        self._writing = self.directory.with_name(self.directory.name + ".writing")
        shutil.rmtree(self._writing, ignore_errors=True)
        self._writing.mkdir(parents=True)
        self._total, groups = sum(sizes.values()), _groups(sizes, file_bytes)
        files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)] if len(groups) > 1 else [SINGLE]
        self._file_of = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        self._last = {names[-1] for names in groups}
        self._waiting: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._waiting[name] = tensor.detach().cpu().contiguous()
        if name in self._last:
            file = self._writing / self._file_of[name]
            save_file(self._waiting, file, metadata={"format": "pt"})
            file.chmod(self._writing.stat().st_mode & 0o666)  # safetensors leaves it readable for its owner alone
            self._waiting = {}

    def close(self, config: dict) -> None:
        """Write index and config.json, and give the directory its name."""
        assert not self._waiting, f"{list(self._waiting)} came in another order than announced"
        if len(self._last) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._file_of.items()))}
            (self._writing / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (self._writing / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if self.directory.exists():
            self.directory.rmdir()
        os.replace(self._writing, self.directory)

    def copy(self, source: str | Path, names: Sequence[str]) -> None:
        """Copy those files of `source` that are there."""
        copy_files(source, self._writing, names)


def copy_files(source: str | Path, target: str | Path, names: Sequence[str]) -> None:
    """Copy those of `names` that are in `source` into the directory `target`, which is made."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in names:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def _groups(sizes: Mapping[str, int], file_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not groups or used + size > file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
