"""A vLLM with the weights of a Hugging Face directory, for commands that draw answers from a finished model.

The weights are sent as a trainer sends them: only so does the engine refuse a set that is not full, and say which weights drew a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_plugin.hooks.weights.files import HFReader
from megatron_plugin.rollout.transfer import send_weights
from megatron_plugin.rollout.transports.shm import SharedMemory
from megatron_plugin.rollout.vllm_model import context_length, read_config
from megatron_plugin.rollout.vllm_process import EngineOptions

__all__ = ["end_ids", "fill", "hf_engine_options", "started", "weights_of"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IGNORED = ("rotary_emb.inv_freq",)  # in old Llama directories; computed, not loaded
Engine = TypeVar("Engine")


def hf_engine_options(model: Path, *, context: int = 0, memory: float = 0.0, **others: Any) -> EngineOptions:
    """Of an engine for the directory `model`.  ValueError for what no engine can be started with.

    context: tokens of prompt and answer; 0: the model's, at most 32768.  memory: share of the GPU's memory, or GiB of key-value cache on a
    CPU; 0: 0.9, or 0.25.  others: as EngineOptions has them."""
    config = read_config(str(model))
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"got dtype {dtype!r} in config.json, expected one of {', '.join(DTYPES)}")
    return EngineOptions(
        model_dir=str(model), dtype=dtype, max_model_len=context_length(config, context), gpu_memory_utilization=memory or 0.9,
        kv_cache_bytes=int((memory or 0.25) * 2**30), **others,
    )  # fmt: skip


@contextmanager
def started(options: EngineOptions, start: Callable[[EngineOptions], Engine]) -> Iterator[Engine]:
    """An engine with the directory's weights; it ends with the block.  A directory without weights is refused before the engine is started."""
    HFReader(Path(options.model_dir))
    print(f"starting vLLM on {options.model_dir} (log: {options.log})", flush=True)
    engine = start(options)
    try:
        fill(engine, options, version=1)
        yield engine
    finally:
        engine.close()


def fill(engine: Any, options: EngineOptions, *, version: int) -> None:
    """Send the weights of options.model_dir; version: higher than every one before."""
    model = Path(options.model_dir)
    tied = bool(read_config(str(model)).get("tie_word_embeddings", False))
    send_weights([engine], weights_of(HFReader(model), tied=tied), version=version, transport=SharedMemory(), dtype=DTYPES[options.dtype])


def weights_of(reader: HFReader, *, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a directory, one at a time; of tied weights the embedding alone."""
    for name in reader.names:
        if not name.endswith(IGNORED) and not (tied and name == "lm_head.weight"):
            yield name, reader.read(name, 0, 0, None)


def end_ids(tokenizer: Any, model: Path) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, and those of generation_config.json and config.json."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (model / name).is_file():
            ends = json.loads((model / name).read_text("utf-8")).get("eos_token_id")
            found |= set(ends) if isinstance(ends, list) else {ends}
    return tuple(sorted(found - {None}))
