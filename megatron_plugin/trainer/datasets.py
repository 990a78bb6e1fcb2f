"""From the `data` section to tokenizer, training rows and held-out sets: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_plugin.config import Config, ConfigError
from megatron_plugin.data import (
    BadLines,
    Conversation,
    PackedRows,
    PromptSet,
    encode_all,
    encode_prompts,
    load_tokenizer,
    pack_samples,
    pad_id,
    read_conversations,
    train_tokenizer,
    true_vocab_size,
    write_arithmetic,
)

__all__ = ["Datasets", "EvalSet", "prepare_datasets"]


@dataclass(frozen=True)
class EvalSet:
    name: str
    rows: PackedRows
    conversations: Sequence[Conversation]


@dataclass(frozen=True)
class Datasets:
    tokenizer: object
    vocab_size: int
    """True size, before padding."""
    train: PackedRows
    evals: Sequence[EvalSet]
    bad_lines: BadLines
    prompts: PromptSet | None = None
    """On-policy: what completions are sampled of."""

    def counts(self) -> dict[str, float]:
        """Metrics: everything that was cut or left out on the way from the files to the rows and prompts."""
        found = {"bad_lines": len(self.bad_lines), "truncated": len(self.train.report.truncated), "dropped": len(self.train.report.dropped)}
        found["heldout_truncated"] = sum(len(held_out.rows.report.truncated) for held_out in self.evals)
        found["heldout_dropped"] = sum(len(held_out.rows.report.dropped) for held_out in self.evals)
        if self.prompts is not None:
            found["prompts_left_out"] = len(self.prompts.too_long) + len(self.prompts.unasked)
        return {f"data/{name}": float(count) for name, count in found.items()}


def prepare_datasets(config: Config, run_dir: Path, weights_from: Path | None) -> Datasets:
    """Read, tokenise and pack everything.  Rank 0 alone writes (embedded problems, a tokenizer trained on the spot); the others wait.

    `weights_from`: the run directory of the checkpoint that will be loaded; its tokenizer is used unless the configuration names one.
    """
    train_files, eval_files = _files(config, run_dir)
    bad_lines = BadLines(config.data.on_bad_line, config.data.max_bad_fraction)
    train = _read(config, train_files, bad_lines)
    tokenizer = _tokenizer(config, run_dir, weights_from, train)
    data = config.data
    rows = pack_samples(
        encode_all(train, tokenizer, bad_lines), data.seq_length, pad_id=pad_id(tokenizer), packing=data.packing, overlong=data.overlong,
        bad_lines=bad_lines,
    )  # fmt: skip
    evals = [_eval_set(config, name, path, tokenizer) for name, path in eval_files.items()]
    if config.role.demonstrations:  # a prompt whose demonstration was left out has none to join its group
        shown = {sample.source for sample in rows.samples}
        train = [conversation for conversation in train if conversation.source in shown]
    prompts = _prompts(config, run_dir, train, tokenizer, bad_lines) if config.rollout else None
    return Datasets(tokenizer, true_vocab_size(tokenizer), rows, evals, bad_lines, prompts)


def _files(config: Config, run_dir: Path) -> tuple[list[Path], dict[str, Path]]:
    """Training files and held-out files by name; the embedded problems where the configuration names none."""
    evals = {Path(path).stem if len(config.data.eval) > 1 else "heldout": Path(path) for path in config.data.eval}
    if len(evals) < len(config.data.eval):
        raise ConfigError(f"got {', '.join(config.data.eval)}, expected files of different names: their metrics are called after them", "data.eval")
    if config.data.train:
        return [Path(path) for path in config.data.train], evals
    if _is_leader():
        write_arithmetic(run_dir / "data", config.seed, filler=config.data.filler)
    dist.barrier()
    embedded = {name: run_dir / "data" / f"{name}.jsonl" for name in ("heldout", "ood")}
    return [run_dir / "data" / ("expert.jsonl" if config.rollout else "train.jsonl")], evals or embedded


def _read(config: Config, files: Sequence[Path], bad_lines: BadLines) -> list[Conversation]:
    return [c for path in files for c in read_conversations(path, train_on=config.data.train_on, bad_lines=bad_lines)]


def _prompts(config: Config, run_dir: Path, train: Sequence[Conversation], tokenizer, bad_lines: BadLines) -> PromptSet:
    """Those of data.prompts; else embedded ones beside embedded training data, and the training data's own beside a person's.

    srft always takes the latter: its demonstrations answer the prompts that are sampled."""
    files = [Path(path) for path in config.data.prompts]
    if not files and not config.data.train:
        files = [run_dir / "data" / "prompts.jsonl"]
    if files and not config.role.demonstrations:
        train = [c for path in files for c in read_conversations(path, bad_lines=bad_lines)]
    return encode_prompts(train, tokenizer, longest=config.data.seq_length - config.rollout.max_tokens, bad_lines=bad_lines)


def _tokenizer(config: Config, run_dir: Path, weights_from: Path | None, train: Sequence[Conversation]):
    """The configured one, that of the weights, or one trained now; a copy is always in the run directory, so that it is complete."""
    own = run_dir / "tokenizer"
    template = Path(config.data.chat_template).read_text() if config.data.chat_template else None
    taken = Path(config.data.tokenizer) if config.data.tokenizer else weights_from / "tokenizer" if weights_from else None
    if taken is None:  # whatever an aborted start has left in `own` belongs to no weights
        if _is_leader():
            train_tokenizer((m.content for c in train for m in c.messages), own, vocab_size=config.data.bpe_vocab_size)
        dist.barrier()
        return load_tokenizer(own, chat_template=template)
    tokenizer = load_tokenizer(taken, chat_template=template)
    if _is_leader() and taken.resolve() != own.resolve():
        tokenizer.save_pretrained(str(own))
    dist.barrier()
    return tokenizer


def _eval_set(config: Config, name: str, path: Path, tokenizer) -> EvalSet:
    """Held-out rows, packed as configured; a sample that is too long is left out where training would stop, and counted in the report."""
    conversations = read_conversations(path, train_on=config.data.train_on)
    conversations = conversations[: config.data.eval_samples or None]
    overlong = "drop" if config.data.overlong == "error" else config.data.overlong
    rows = pack_samples(
        encode_all(conversations, tokenizer), config.data.seq_length, pad_id=pad_id(tokenizer), packing=config.data.packing, overlong=overlong
    )
    return EvalSet(name, rows, conversations)


def _is_leader() -> bool:
    return dist.get_rank() == 0
