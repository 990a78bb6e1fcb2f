"""A bucket: tensors laid end to end as raw bytes, and the description that an engine needs to take them apart again."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Manifest", "as_bytes", "tensors_of"]

ALIGNMENT = 64  # bytes: a view of any dtype at any offset, on a cache line


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's elements as [bytes] uint8 on its device; a copy only of a strided tensor."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def crc32(data: Tensor) -> int:
    """CRC-32 of [bytes] uint8.  In Python's own zlib, 0.5 to 1 GB/s, and unlike a sum it sees elements that changed places."""
    return zlib.crc32(data.cpu().numpy())


@dataclass
class Manifest:
    """What lies where in a bucket.  Parallel lists, plain numbers and strings: it travels as JSON."""

    names: list[str] = field(default_factory=list)
    """Of Hugging Face's checkpoint format."""
    dtypes: list[str] = field(default_factory=list)
    """Such as "bfloat16"."""
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Bytes from the start of the bucket."""
    crc32: list[int] = field(default_factory=list)
    """Of each tensor's bytes; empty: not verified."""
    size: int = 0
    """Bytes of the bucket."""

    def next_offset(self) -> int:
        """Where the next tensor goes."""
        return -(-self.size // ALIGNMENT) * ALIGNMENT

    def add(self, name: str, tensor: Tensor, data: Tensor, *, checksum: bool) -> int:
        """Note one tensor and its bytes; returns the offset they belong at."""
        offset = self.next_offset() if data.numel() else 0
        self.names.append(name)
        self.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        self.shapes.append(list(tensor.shape))
        self.offsets.append(offset)
        if checksum:
            self.crc32.append(crc32(data))
        self.size = max(self.size, offset + data.numel())
        return offset

    @staticmethod
    def of(update_info: Mapping[str, Any]) -> Manifest:
        """From an update_info, whatever else the transport put there.  ValueError for lists that do not belong together."""
        manifest = Manifest(**{name: update_info[name] for name in Manifest.__dataclass_fields__})
        lengths = {len(manifest.names), len(manifest.dtypes), len(manifest.shapes), len(manifest.offsets)}
        if len(lengths) > 1 or (manifest.crc32 and len(manifest.crc32) not in lengths):
            raise ValueError(f"got an update of {len(manifest.names)} names with lists of {sorted(lengths)} entries, expected one entry each")
        return manifest


def tensors_of(manifest: Manifest, data: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as views of a bucket's [bytes] uint8.

    ValueError for a tensor outside of the bucket, and for one whose bytes are not those that were sent, where checksums came along."""
    for i, (name, dtype, shape, offset) in enumerate(zip(manifest.names, manifest.dtypes, manifest.shapes, manifest.offsets, strict=True)):
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"{name}: got dtype {dtype!r}, expected one of torch's such as 'bfloat16'")
        size = math.prod(shape) * kind.itemsize
        if not 0 <= offset <= offset + size <= data.numel():
            raise ValueError(f"{name}: got bytes {offset} to {offset + size}, expected them inside the bucket of {data.numel()}")
        raw = data[offset : offset + size]
        if manifest.crc32 and (found := crc32(raw)) != manifest.crc32[i]:
            raise ValueError(f"{name}: got checksum {found:08x}, expected {manifest.crc32[i]:08x}: its bytes changed on the way; send the weights again")
        yield name, raw.view(kind).view(shape)
