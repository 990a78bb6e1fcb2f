"""`megatron-plugin realign`: expert data in the model's own words (rollout/hinted/realign.py says how), by a vLLM that this command starts.

    OUT/outcomes.jsonl    a line for each line of the data, in its order: the record or the reason; a second start goes on where it ends
    OUT/realign.json      what was realigned with what: another model, file or option is refused
    OUT/realigned.jsonl   the records, as data.train takes them     \\ made from outcomes.jsonl when the command ends,
    OUT/rejected.jsonl    line, source and reason of the others     / also with an error or by Ctrl-C
    OUT/scores.jsonl      log p, entropy and cll of each record under the model, which realigned.jsonl has too: trainer/realign_scores.py

Lines are read a batch at a time; of a batch that a kill cuts off nothing is there, and it is realigned again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_plugin.config import ConfigError, as_config_error
from megatron_plugin.data import ConversationEncoder, DataError, iter_lines, load_tokenizer, true_vocab_size
from megatron_plugin.data.claim import claim, file_sha256, weights_digest
from megatron_plugin.data.scores import ScoreFile, read_scores
from megatron_plugin.rollout.engine import SamplingParams
from megatron_plugin.rollout.hinted.decode import HintedDecoder
from megatron_plugin.rollout.hinted.engine import start_pair_engine
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.realign import ANALYSIS_PROMPT, Realigner, RealignOptions
from megatron_plugin.rollout.rewards import make_reward
from megatron_plugin.rollout.vllm_model import read_config
from megatron_plugin.trainer.hf_engine import end_ids, hf_engine_options, started
from megatron_plugin.trainer.realign_scores import score_records, scores_of_records
from megatron_plugin.trainer.realign_summary import Ticker, mean_cll, summary

__all__ = ["RealignTask", "realign_file"]

OF_DECODING = ("beta", "temperature", "max_tokens", "splitter", "seed")


@dataclass(frozen=True, kw_only=True)
class RealignTask:
    """What is asked.  Fields without a comment are those of HintedOptions."""

    data: Path
    model: Path
    """Hugging Face directory with weights and tokenizer."""
    out: Path
    samples: int = 0
    """Lines from the beginning of the file; 0: all."""
    reward: str = "numeric"
    """A name of make_reward."""
    unaided: int = 1
    """Answers that the model gives without help: one is greedy, several are drawn at temperature 1, 0 is none."""
    beta: float = 0.7
    temperature: float = 0.3
    max_tokens: int = 8192
    splitter: str = "\\boxed{"
    seed: int = 0
    analysis_prompt: str = ANALYSIS_PROMPT
    concurrency: int = 32
    """Pairs drawn at once."""
    context: int = 0
    """Tokens of prompt and answer; 0: the model's, at most 32768."""
    memory: float = 0.0
    """Share of the GPU's memory, or GiB of key-value cache on a CPU; 0: 0.9, or 0.25."""
    tensor: int = 1
    """GPUs that share the model in vLLM."""
    score: bool = True
    """Mean cll of every record, by a forward pass of the model on one device once vLLM has ended."""


def realign_file(task: RealignTask) -> None:
    """Realign task.data, or go on with it.  ConfigError for the model and the options, DataError for data of which nothing can be kept,
    EngineLostError when vLLM does not come up or dies: what was written stays, and the same command goes on."""
    work = _Realigning(task)
    try:
        work.run()
    finally:
        work.close()


class _Realigning:
    def __init__(self, task: RealignTask):
        """Everything that can be wrong is found before the engine is started, which takes half a minute."""
        self.task = task
        with as_config_error("realign"):
            self.config = read_config(str(task.model))
        self.tokenizer = load_tokenizer(task.model)
        ConversationEncoder(self.tokenizer)  # a tokenizer without a chat template is refused here
        vocab_size = true_vocab_size(self.tokenizer)
        if vocab_size > (columns := self.config.get("vocab_size", vocab_size)):
            raise ConfigError(f"{task.model}: got a tokenizer with ids up to {vocab_size - 1}, expected below vocab_size {columns} of config.json")
        ends = end_ids(self.tokenizer, task.model)
        if not ends:
            raise ConfigError(f"{task.model}: got a tokenizer without an end token, and none in generation_config.json or config.json: no answer "
                              "would end; set eos_token in tokenizer_config.json")  # fmt: skip
        with as_config_error("realign"):
            self.hinted = HintedOptions(vocab_size=vocab_size, end_ids=ends, **{name: getattr(task, name) for name in OF_DECODING})
            self.engine_options = hf_engine_options(
                task.model, context=task.context, memory=task.memory, max_num_seqs=2 * task.concurrency, tensor=task.tensor, seed=task.seed,
                log=str(task.out / "engine.log"),
            )  # fmt: skip
            self.reward = make_reward(task.reward)
        self.file: ScoreFile | None = None

    def close(self) -> None:
        self.reward.close()
        if self.file is not None:
            self.file.close()

    def run(self) -> None:
        task = self.task
        wanted = {name: getattr(task, name) for name in ("reward", "unaided", "analysis_prompt", *OF_DECODING)}
        wanted |= {"model": str(task.model.resolve()), "weights": weights_digest(task.model), "context": self.engine_options.max_model_len}
        claim(task.out / "realign.json", wanted | {"data": str(task.data.resolve()), "sha256": file_sha256(task.data)}, kind="answers")
        self.file = ScoreFile(task.out / "outcomes.jsonl")
        total, done = _lines(task), self.file.lines
        if not total:
            raise DataError("got no line, expected a jsonl file with at least one conversation", str(task.data))
        if done:
            print(f"{self.file.path}: going on behind line {done}", flush=True)
        else:
            (task.out / "scores.jsonl").unlink(missing_ok=True)  # of outcomes that somebody removed
        tokens, pairs, begun = 0, Counter[str](), time.perf_counter()
        if done < total:
            with self._files(), self._decoder() as decoder, Ticker(total, done) as ticker:
                begun = time.perf_counter()
                tokens, pairs = self._realign(decoder, ticker)
        else:
            write_results(self.file.path)
        seconds = time.perf_counter() - begun
        said, kept = summary(self.file.path, task.splitter)
        print(said)
        if any(pairs.values()):
            print("pairs: " + ", ".join(f"{count} {name}" for name, count in pairs.most_common() if count))
        if self.file.lines > done:
            print(f"{self.file.lines - done} lines, {tokens} tokens drawn in {seconds:.1f} s: {tokens / max(seconds, 1e-9):,.0f} tokens/s")
        if kept and task.score:
            score_records(self.file.path, task.model, self.tokenizer)
            write_results(self.file.path)
            print(mean_cll(task.out / "realigned.jsonl"))
        print(f"{task.out}: realigned.jsonl rejected.jsonl outcomes.jsonl{' scores.jsonl' if kept and task.score else ''}", flush=True)
        if not kept:
            raise DataError(f"none of {self.file.lines} samples was kept: see {task.out / 'rejected.jsonl'}", str(task.data))

    def _realign(self, decoder: HintedDecoder, ticker: Ticker) -> tuple[int, Counter[str]]:
        """The lines that are left.  Returns the tokens drawn, and what went wrong with pairs, counted."""
        task = self.task
        unaided = None
        if task.unaided:
            several = task.unaided > 1
            unaided = SamplingParams(max_tokens=task.max_tokens, n=task.unaided, temperature=float(several), seed=task.seed if several else None)
        options = RealignOptions(unaided=unaided, analysis_prompt=task.analysis_prompt, batch=2 * task.concurrency)
        realigner = Realigner(decoder, self.reward, options)
        left = islice(enumerate(iter_lines(task.data), 1), self.file.lines, task.samples or None)
        while batch := list(islice(left, options.batch)):
            results = realigner.batch([item for _, item in batch])
            self.file.append(_outcome(line, result) for (line, _), result in zip(batch, results, strict=True))
            ticker.say(self.file.lines, realigner)
        return realigner.tokens, realigner.pairs

    @contextlib.contextmanager
    def _decoder(self) -> Iterator[HintedDecoder]:
        with started(self.engine_options, lambda options: start_pair_engine(options, self.task.model)) as engine:
            yield HintedDecoder(engine, self.hinted, self.tokenizer)

    @contextlib.contextmanager
    def _files(self) -> Iterator[None]:
        """realigned.jsonl and rejected.jsonl of all outcomes, whatever ended the block."""
        try:
            yield
        finally:
            write_results(self.file.path)


def _outcome(line: int, result: Any) -> dict[str, Any]:
    """A line of outcomes.jsonl."""
    said = {"line": line, "kind": result.kind, "source": result.source}
    said |= {"end_reason": result.end_reason} if result.end_reason else {}
    return said | ({"record": result.record} if result.record is not None else {"reason": result.reason})


def write_results(outcomes: Path) -> None:
    """realigned.jsonl and rejected.jsonl beside outcomes.jsonl, each at once; the records with what scores.jsonl says of them so far."""
    names, scores = ("realigned.jsonl", "rejected.jsonl"), scores_of_records(outcomes)
    with tempfile.TemporaryDirectory(dir=outcomes.parent, prefix=".") as folder:
        kept, rejected = (open(Path(folder) / name, "w", encoding="utf-8") for name in names)
        with kept, rejected:
            for outcome in read_scores(outcomes):
                if "record" in outcome:
                    kept.write(json.dumps(outcome["record"] | next(scores, {}), ensure_ascii=False) + "\n")
                else:
                    rejected.write(json.dumps(outcome, ensure_ascii=False) + "\n")
        for name in names:
            os.replace(Path(folder) / name, outcomes.parent / name)


def _lines(task: RealignTask) -> int:
    with open(task.data, "rb") as file:
        return sum(1 for _ in islice(file, task.samples or None))
