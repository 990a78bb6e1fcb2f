"""`megatron-plugin import` and `export`: a Hugging Face directory <-> a run directory whose checkpoint any layout can load.

    RUN_DIR/checkpoints/step_00000000/    megatron-core's shards and train_state.json
    RUN_DIR/tokenizer/                    the tokenizer's files, and config.json: transformers chooses the tokenizer's class by it, and it is
                                          what an export of a run that started here writes
    RUN_DIR/config.yaml                   `model`, `data.tokenizer` and `checkpoint.init` to start training with; written last
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from megatron_plugin.config import Config, as_config_error
from megatron_plugin.config.layout import layout_config
from megatron_plugin.data import load_tokenizer, true_vocab_size
from megatron_plugin.hooks.mcore import check_megatron_core
from megatron_plugin.hooks.weights import ModelFields, WeightsError, export_hf, import_hf, read_hf_config, transformer_fields
from megatron_plugin.hooks.weights.files import TOKENIZER_FILES, copy_files
from megatron_plugin.trainer.changes import model_record
from megatron_plugin.trainer.checkpoint import find_checkpoint, load_checkpoint, read_state
from megatron_plugin.trainer.hf_model import hf_config_for, run_values
from megatron_plugin.trainer.model import DTYPES, build_model, transformer_config
from megatron_plugin.trainer.saving import save_checkpoint
from megatron_plugin.trainer.world import world

__all__ = ["empty_model", "export_model", "import_model", "layout_config"]

HF_FILES = ("config.json", "generation_config.json")  # beside the tokenizer's
SEQ_LENGTH = 2048


def import_model(hf_dir: str | Path, run_dir: str | Path, overrides: Sequence[str] = (), *, world_size: int = 1) -> None:
    """Make `run_dir`, which checkpoint.init= takes, from a Hugging Face directory.  Every rank calls it.

    `overrides`: parallel.*=N for the layout of this conversion, train.dtype=fp32|bf16 for the checkpoint (default: the model's own).
    WeightsError, ConfigError or DataError for what cannot be used."""
    check_megatron_core()
    source, target = Path(hf_dir), Path(run_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"got {target}, which is not empty, expected a run directory to be made: choose another")
    hf_config = read_hf_config(source)
    fields = transformer_fields(hf_config)
    vocab_size = true_vocab_size(load_tokenizer(source))
    if vocab_size > fields.vocab_size:
        raise WeightsError(f"{source}: got a tokenizer with ids up to {vocab_size - 1}, expected below vocab_size {fields.vocab_size} of config.json")
    values = _start_values(target, hf_config, fields, vocab_size)
    config = layout_config(values, overrides, world_size, settable=("parallel.", "train.dtype="))
    values["train"] = {"dtype": config.train.dtype}
    with world(config):
        chunks = empty_model(config, vocab_size)
        import_hf(chunks, source)
        state = {"step": 0, "vocab_size": vocab_size, "model": model_record(config, chunks[0].config)}
        save_checkpoint(target, chunks, None, state, keep=0)
        if dist.get_rank() == 0:
            copy_files(source, target / "tokenizer", TOKENIZER_FILES + HF_FILES)
            (target / "config.yaml").write_text(_yaml(values, target, source), "utf-8")
            print(f"{target}: checkpoints/step_00000000 ({config.train.dtype}) tokenizer/ config.yaml", flush=True)
        dist.barrier()


def export_model(
    run_dir: str | Path, hf_dir: str | Path, overrides: Sequence[str] = (), *, like: str | Path | None = None, dtype: str | None = None,
    world_size: int = 1,
) -> None:  # fmt: skip
    """Write a Hugging Face directory from a run directory or checkpoint.  Every rank calls it.

    config.json is that of `like`, else that of the imported model from which the run started, else made from the run's config.yaml.
    `overrides`: parallel.*=N.  `dtype`: fp32 or bf16, None: the run's."""
    check_megatron_core()
    checkpoint = find_checkpoint(run_dir)
    run, state = checkpoint.parent.parent, read_state(checkpoint)
    values = run_values(run)
    config = layout_config({"model": values["model"], "train": {"dtype": values.get("train", {}).get("dtype", "fp32")}}, overrides, world_size,
                     settable=("parallel.",))  # fmt: skip
    origin = Path(like) if like else None
    hf_config, origin = (read_hf_config(origin), origin) if origin else hf_config_for(run, values, state["vocab_size"])
    with world(config):
        chunks = empty_model(config, state["vocab_size"])
        load_checkpoint(checkpoint, chunks)
        files_from = [*([origin] if origin else []), run / "tokenizer"]
        export_hf(chunks, hf_dir, like=hf_config, files_from=files_from, dtype=DTYPES[dtype] if dtype else None)
        if dist.get_rank() == 0:
            print(f"{hf_dir}: {checkpoint.name} of {run}, config.json {f'like {origin}' if origin else 'made from config.yaml'}", flush=True)


def empty_model(config: Config, vocab_size: int) -> list:
    """This rank's model chunks, whose every weight is still to be loaded."""
    with as_config_error("model"):
        transformer = transformer_config(config)
        transformer.perform_initialization = False
        return build_model(config, transformer, vocab_size)


def _start_values(target: Path, hf_config: dict[str, Any], fields: ModelFields, vocab_size: int) -> dict[str, Any]:
    """What config.yaml says.  run_dir lies inside `target`: the run's own checkpoints must not be taken for the imported one."""
    half = (hf_config.get("dtype") or hf_config.get("torch_dtype")) == "bfloat16"
    return {
        "run_dir": str(target / "train"),
        "train": {"dtype": "bf16" if half else "fp32"},
        "data": {"tokenizer": str(target / "tokenizer"), "seq_length": min(SEQ_LENGTH, fields.max_positions)},
        "model": fields.transformer | fields.gpt | {"make_vocab_size_divisible_by": _vocab_multiple(vocab_size, fields.vocab_size)},
        "checkpoint": {"init": str(target)},
    }


def _vocab_multiple(tokens: int, rows: int) -> int:
    """The power of two, at least 128, that pads the tokenizer's `tokens` to at least the `rows` of Hugging Face's embedding.

    Qwen2.5's tokenizer has 151 665 tokens, its embedding 151 936 rows: with 128 the last 256 would be lost."""
    multiple = 128
    while -(-tokens // multiple) * multiple < rows:
        multiple *= 2
    return multiple


def _yaml(values: dict[str, Any], target: Path, source: Path) -> str:
    head = (f"# {source} in megatron-core's form.  Train from it, in any layout:\n"
            f"#   megatron-plugin train {target}/config.yaml loss.name=dft data.train=my.jsonl train.steps=200\n")  # fmt: skip
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
