"""`megatron-plugin score`: how on-distribution a data set is for a model, sample by sample (losses/cll.py has the statistic).

    OUT/scores.jsonl     a line for each line of the data, in its order (data/scores.py); a second start goes on where it ends
    OUT/score.json       what was scored with what: another model or file is refused
    OUT/report.html      one page (trainer/score_report.py), also as report.md with cll.png beside it

Lines are read as they are needed, a window at a time: memory does not grow with the file.  Data-parallel ranks share a window's samples; the
ranks of one replica score the same ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.data import Conversation, ConversationEncoder, DataError, Sample, iter_lines, load_tokenizer, true_vocab_size, truncate
from megatron_plugin.data.claim import claim, file_sha256, weights_digest
from megatron_plugin.data.scores import ScoreFile, read_scores, sample_score, summarise
from megatron_plugin.hooks.attach import attach
from megatron_plugin.hooks.mcore import check_megatron_core, groups
from megatron_plugin.ops import Head
from megatron_plugin.trainer.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, read_state
from megatron_plugin.trainer.convert import empty_model, layout_config
from megatron_plugin.trainer.hf_model import run_values
from megatron_plugin.trainer.mixed import mix, score
from megatron_plugin.trainer.score_report import write_report
from megatron_plugin.trainer.world import world

__all__ = ["Task", "score_with_checkpoint", "score_with_directory", "score_with_engine"]

WINDOW = 128
"""Lines of the data that one data-parallel rank takes at a time: what a kill loses, and what a packing can choose from."""
REQUESTS = 16
"""Prompts that an engine is asked at once."""
SAY_S = 10.0
KEPT = ("seq_length", "packing", "train_on")
"""Keys of the run's `data` that decide what is scored."""

Line = tuple[int, Conversation | DataError]
Model = Callable[[Sequence[Sample]], Sequence[tuple[Tensor, Tensor | None]]]
"""Samples -> (log p, entropy or None) of each, fp32 [T] at the tokens' own places.  Called by every rank together, also with no samples."""


@dataclass(frozen=True)
class Task:
    """What is asked."""

    data: Path
    out: Path
    samples: int = 0
    """Lines from the beginning of the file; 0: all."""
    worst: int = 20
    """Samples that the report shows."""
    rows: int = 8
    """Rows of one forward pass on one data-parallel rank."""
    url: str = ""
    """Of a vLLM server that has the model; empty: the model runs here."""


def score_with_checkpoint(task: Task, model: str | Path, overrides: Sequence[str] = (), *, world_size: int = 1) -> None:
    """Score with a run directory's newest checkpoint or the one given, in any layout; every rank calls it.

    overrides: parallel.*=N, data.seq_length=N (a longer sample is cut, and counted), data.packing, data.train_on, train.dtype.
    CheckpointError or ConfigError for the model; DataError for a file that cannot be read, is empty, or of which nothing can be scored."""
    check_megatron_core()
    checkpoint = find_checkpoint(model)
    run, state = checkpoint.parent.parent, read_state(checkpoint)
    values = run_values(run)
    data = {key: value for key, value in (values.get("data") or {}).items() if key in KEPT}
    values = {"model": values["model"], "train": {"dtype": (values.get("train") or {}).get("dtype", "fp32")}, "data": data}
    config = layout_config(values, overrides, world_size, settable=("parallel.", "train.dtype=", *(f"data.{key}=" for key in KEPT)))
    config = replace(config, train=replace(config.train, micro_batch=task.rows))
    tokenizer = load_tokenizer(run / "tokenizer")
    if (found := true_vocab_size(tokenizer)) != state["vocab_size"]:
        raise CheckpointError(f"{checkpoint} was trained with a vocabulary of {state['vocab_size']}, {run / 'tokenizer'} has {found}: is it the run's own?")
    with world(config):
        chunks = empty_model(config, state["vocab_size"])
        load_checkpoint(checkpoint, chunks)
        handle = attach(chunks, "sft", head=Head(vocab_size=state["vocab_size"]), one_pass=True)

        def scored(samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor | None]]:
            return [(x.logp_T, x.entropy_T) for x in score(config, chunks, handle, mix(config, samples))]

        identity = {"model": str(checkpoint.resolve()), "weights": weights_digest(checkpoint), "dtype": config.train.dtype, "train_on": config.data.train_on}
        _Scoring(task, tokenizer, config.data.seq_length, config.data.train_on, scored, identity, _Replicas()).run()


def score_with_directory(task: Task, model: Path) -> None:
    """Score with a Hugging Face directory, by transformers, in its own dtype on one device.  ConfigError for what transformers cannot load."""
    from megatron_plugin.trainer.hf_scorer import HFScorer  # needs transformers, which scoring with a checkpoint does without

    tokenizer = load_tokenizer(model)
    scorer = HFScorer(model, vocab_size=true_vocab_size(tokenizer), rows=task.rows)
    identity = {"model": str(model.resolve()), "weights": weights_digest(model), "dtype": scorer.dtype, "train_on": "all"}
    _Scoring(task, tokenizer, scorer.longest, "all", scorer, identity, _Alone()).run()


def score_with_engine(task: Task, model: str | Path) -> None:
    """Score with the vLLM server at task.url, which serves the Hugging Face directory `model`: log-probabilities alone, no entropy and no cll.

    At temperature 1, whatever the server samples with.  EngineError or EngineLostError for what the server refuses or fails at."""
    from megatron_plugin.rollout.prompt_scores import PromptScores  # needs httpx, which scoring with a checkpoint does without

    engine, tokenizer = PromptScores(task.url), load_tokenizer(model)

    def scored(samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor | None]]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return [(torch.tensor(logp), None) for logp in pool.map(lambda sample: engine.logp(sample.tokens_T.tolist()), samples)]

    identity = {"model": str(Path(model).resolve()), "dtype": "the server's", "train_on": "all"}
    if engine.weights:
        print(f"{task.url} has the weights that a trainer sent it, {engine.weights}, not those of {model}", flush=True)
        identity["weights"] = engine.weights
    _Scoring(task, tokenizer, engine.longest, "all", scored, identity, _Alone()).run()


class _Alone:
    """One process that has everything."""

    index, count, leader = 0, 1, True

    def gather(self, mine: Any) -> list:
        return [mine]

    def on_leader(self, ask: Callable[[], Any]) -> Any:
        return ask()


class _Replicas:
    """Data-parallel replicas; the leader is rank 0 of the job, which writes."""

    def __init__(self):
        self.group = groups().dp
        self.index, self.count, self.leader = self.group.rank(), self.group.size(), dist.get_rank() == 0

    def gather(self, mine: Any) -> list:
        """Of each replica, on every rank."""
        everyone = [None] * self.count
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def on_leader(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns on the leader, on every rank; DataError everywhere if it raises one there."""
        answer: list[Any] = [None, None]
        if self.leader:
            try:
                answer[0] = ask()
            except DataError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise DataError(answer[1])
        return answer[0]


@dataclass
class _Scoring:
    """One pass over a data set."""

    task: Task
    tokenizer: Any
    seq_length: int
    """Tokens of a sample that can be scored; the rest of a longer one is left out."""
    train_on: str
    model: Model
    identity: dict[str, Any]
    ranks: _Alone | _Replicas
    file: ScoreFile | None = None
    """The leader's."""
    encoder: ConversationEncoder = field(init=False)

    def __post_init__(self):
        self.encoder = ConversationEncoder(self.tokenizer)

    def run(self) -> None:
        done, begun, said, tokens = self.ranks.on_leader(self._open), time.perf_counter(), 0.0, 0
        try:
            for window in self._windows(done):
                mine = self._scores(window[self.ranks.index :: self.ranks.count])
                scores = sorted((one for part in self.ranks.gather(mine) for one in part), key=lambda one: one["line"])
                tokens += sum(one.get("tokens", 0) for one in scores)
                if self.ranks.leader:
                    self.file.append(scores)
                    seconds = time.perf_counter() - begun
                    if seconds - said > SAY_S:
                        said = seconds
                        print(f"line {self.file.lines}: {tokens / seconds:,.0f} answer tokens/s", flush=True)
        finally:
            if self.file is not None:
                self.file.close()
        self.ranks.on_leader(lambda: self._report(done, tokens, time.perf_counter() - begun))

    def _open(self) -> int:
        """On the leader: the lines that are scored already."""
        out, data = self.task.out, self.task.data
        wanted = self.identity | {"data": str(data.resolve()), "sha256": file_sha256(data), "seq_length": self.seq_length}
        claim(out / "score.json", wanted, kind="scores")
        self.file = ScoreFile(out / "scores.jsonl")
        if self.file.lines:
            print(f"{self.file.path}: going on behind line {self.file.lines}", flush=True)
        return self.file.lines

    def _windows(self, done: int) -> Iterator[list[Line]]:
        lines = enumerate(iter_lines(self.task.data, train_on=self.train_on), 1)
        rest = islice(lines, done, self.task.samples or None)
        while window := list(islice(rest, WINDOW * self.ranks.count)):
            yield window

    def _scores(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        """A line of scores.jsonl for each; no line is lost because it is bad."""
        samples, problems = {}, []
        for line, item in lines:
            try:
                samples[line] = self._sample(item)
            except DataError as error:
                problems.append({"line": line, "problem": error.reason})
        found = self.model([sample for sample, _ in samples.values()])
        scores = []
        for (line, (sample, cut)), values in zip(samples.items(), found, strict=True):
            score = sample_score(sample, *values)
            if all(math.isfinite(value) for value in score.values()):
                scores.append({"line": line, **score, **({"truncated": True} if cut else {})})
            else:  # one would make every mean of the data set NaN
                problems.append({"line": line, "problem": "the model gives a token of the answer no finite log-probability or entropy"})
        return problems + scores

    def _sample(self, item: Conversation | DataError) -> tuple[Sample, bool]:
        """(tokens, whether the end was cut off)."""
        if isinstance(item, DataError):
            raise item
        sample = self.encoder.encode(item)
        kept = truncate(sample, self.seq_length) if len(sample.tokens_T) > self.seq_length else sample
        if kept is None:
            raise DataError(f"no token of the answer within the row (got {len(sample.tokens_T)} tokens, the row has {self.seq_length})", item.source)
        return kept, kept is not sample

    def _report(self, done: int, tokens: int, seconds: float) -> None:
        """On the leader: the page; DataError where there is nothing to write one about."""
        found = summarise(read_scores(self.file.path), worst=self.task.worst)
        if not found.lines:
            raise DataError("got no line, expected a jsonl file with at least one conversation", str(self.task.data))
        if not found.samples:
            first = next(iter(found.examples.values()))
            raise DataError(f"none of the {found.lines} lines could be scored; line {first['line']}: {first['problem']}", str(self.task.data))
        page = write_report(self.task.out, found, data=self.task.data, model=self.identity["model"], seq_length=self.seq_length,
                            encoder=self.encoder, train_on=self.train_on)  # fmt: skip
        print(page, flush=True)
        if self.file.lines > done:
            print(f"{self.file.lines - done} lines, {tokens} answer tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s", flush=True)
        print(f"{self.task.out}: scores.jsonl report.html report.md cll.png", flush=True)
