"""import_hf, hf_tensors, export_hf.  Every rank of the job calls them, with all of its chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_plugin.hooks.weights.bridge import Backend, bridge_for
from megatron_plugin.hooks.weights.errors import WeightsError
from megatron_plugin.hooks.weights.exchange import Source, assemble, on_any_rank, sources, together
from megatron_plugin.hooks.weights.files import TOKENIZER_FILES, HFReader, HFWriter, dtype_name
from megatron_plugin.hooks.weights.hf_config import read_hf_config, transformer_fields
from megatron_plugin.hooks.weights.model import Parameter, bare_models, check_model, dims_of, parameters
from megatron_plugin.hooks.weights.names import Dims, expected_tensors, rule_of
from megatron_plugin.hooks.weights.slices import axis, pieces

__all__ = ["export_hf", "hf_tensors", "import_hf"]

Chunks = torch.nn.Module | Sequence[torch.nn.Module]
FILE_BYTES = 4 << 30
# Left alone in a directory: what transformers computes itself, and a tied model's second name of the embedding
COMPUTED, TIED = ("rotary_emb.inv_freq",), ("lm_head.weight",)


def import_hf(chunks: Chunks, path: str | Path, *, backend: Backend = "auto") -> int:
    """Load the Hugging Face directory `path` into this rank's chunks, cast to their dtype; vocabulary padding becomes 0.

    Reads what this rank needs and returns its bytes (0 with Megatron-Bridge).  WeightsError, on every rank alike and before any tensor is read, when
    the model is not config.json's or tensors are missing, unexpected or of another shape.  An optimizer with fp32 master weights that exists
    already takes them over by `optimizer.reload_model_params()`."""
    models = together(lambda: _checked(chunks, read_hf_config(path)))
    if bridge := bridge_for(path, backend, local_names=_local_names(models)):
        bridge.load_hf_weights(models)
        return 0
    fields = transformer_fields(read_hf_config(path))
    dims = dims_of(models, fields.vocab_size)

    def prepare() -> tuple[HFReader, list[Parameter]]:
        reader = HFReader(path)
        reader.check(expected_tensors(dims), COMPUTED + (TIED if dims.tied else ()))
        return reader, list(parameters(models, dims))

    reader, mine = together(prepare)
    with torch.no_grad():
        for parameter in mine:
            _fill(parameter, reader, dims)
    return reader.bytes_read


def _fill(parameter: Parameter, reader: HFReader, dims: Dims) -> None:
    rule, shard = parameter.rule, parameter.tensor.data
    found = pieces(rule, dims, parameter.shard, tuple(shard.shape))
    if sum(piece.stop - piece.start for piece in found) < shard.shape[axis(rule)]:
        shard.zero_()  # the rest is vocabulary padding
    for piece in found:
        piece.of_shard(shard, rule).copy_(reader.read(rule.parts[piece.part].name, axis(rule), piece.start, piece.stop))


def hf_tensors(
    chunks: Chunks, *, vocab_size: int | None = None, to: int | None = None, like: str | Path | None = None, backend: Backend = "auto"
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of the whole model, one parameter at a time, in the model's dtype and on its device.

    For weight transfer, such as into vLLM.  Every rank must exhaust the iterator; the tensors appear on rank `to`, or on all.
    `vocab_size`: rows of Hugging Face's embedding, without megatron-core's padding; None: with it.  `like`: the Hugging Face directory of
    the model, which Megatron-Bridge needs."""
    models = bare_models(chunks)
    if bridge := bridge_for(like, backend, local_names=_local_names(models)):
        yield from ((name, tensor) for name, tensor in bridge.export_hf_weights(models, show_progress=False) if to in (None, dist.get_rank()))
        return
    dims = dims_of(models, vocab_size or models[0].vocab_size)
    yield from _tensors(models, dims, _plan(models, dims), to)


def _plan(models: list[GPTModel], dims: Dims) -> list[Source]:
    return sources(together(lambda: list(parameters(models, dims))), dims)


def _tensors(models: list[GPTModel], dims: Dims, order: list[Source], to: int | None) -> Iterator[tuple[str, Tensor]]:
    mine = {p.name: p.tensor for p in parameters(models, dims)}
    device = next((tensor.device for tensor in mine.values()), torch.device("cpu"))  # a rank without parameters has nothing to send
    return assemble(order, mine, dims, to=to, device=device)


def export_hf(
    chunks: Chunks, path: str | Path, *, like: str | Path | dict[str, Any], files_from: Sequence[str | Path] = (), dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES, backend: Backend = "auto",
) -> None:  # fmt: skip
    """Write a Hugging Face directory: safetensors with an index when there are several, config.json, tokenizer.  Rank 0 writes, and holds one file.

    `like`: the config.json to write, as a dict or as the directory of the model.  `files_from`: directories that tokenizer files and
    generation_config.json are copied from, later ones win; `like` too, when it is a directory.  `dtype`: of the tensors; None: the model's.
    WeightsError when the model is not config.json's, or `path` is there and not empty; `path` appears when it is complete."""
    directory = None if isinstance(like, dict) else like
    config = together(lambda: like if isinstance(like, dict) else read_hf_config(like))
    models = together(lambda: _checked(chunks, config))
    leader = dist.get_rank() == 0
    if bridge := bridge_for(directory, backend, local_names=_local_names(models)):
        bridge.save_hf_pretrained(models, str(path), show_progress=False)
        return
    dims = dims_of(models, transformer_fields(config).vocab_size)
    order = _plan(models, dims)
    writer = together(lambda: HFWriter(path, _sizes(order, dims, dtype), file_bytes) if leader else None)
    failures: list[OSError] = []  # a full disk: the others go on sending until all of it can be said to all
    for name, tensor in _tensors(models, dims, order, to=0):
        if failures or writer is None:  # the leader has one, and only it is given tensors
            continue
        try:
            writer.add(name, tensor.to(dtype or tensor.dtype))
        except OSError as error:
            failures.append(error)

    def finish() -> None:
        assert writer is not None
        for error in failures:
            raise error
        for source in ([directory] if directory else []) + list(files_from):
            writer.copy(source, (*TOKENIZER_FILES, "generation_config.json"))
        key = "dtype" if "dtype" in config else "torch_dtype"
        writer.close(config | {key: dtype_name(dtype or models[0].config.params_dtype)})

    together(finish if leader else lambda: None)


def _sizes(order: list[Source], dims: Dims, dtype: torch.dtype | None) -> dict[str, int]:
    """{Hugging Face tensor: bytes} in the order in which they come."""
    parts = ((part, dtype or source.dtype) for source in order for part in rule_of(source.name, dims).parts)
    return {part.name: torch.Size(part.shape).numel() * kind.itemsize for part, kind in parts}


def _local_names(models: list[GPTModel]) -> bool:
    """Whether the norms have the names of megatron-core's local spec, on any rank (a stage may have no layer)."""
    return on_any_rank(any(name.endswith(".input_layernorm.weight") for model in models for name, _ in model.named_parameters()))


def _checked(chunks: Chunks, config: dict[str, Any]) -> list[GPTModel]:
    models = bare_models(chunks)
    if not models:
        raise WeightsError("got no model chunk, expected this rank's GPTModel chunks")
    check_model(models, transformer_fields(config))
    return models
