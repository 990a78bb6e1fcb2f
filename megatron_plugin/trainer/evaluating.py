"""`megatron-plugin eval`: held-out data under a model: NLL and cll of its answers, and answers drawn by vLLM and verified.

    OUT/eval.json        what was evaluated with what: another model, file or option is refused
    OUT/score/           as `megatron-plugin score` writes it
    OUT/hf/              the checkpoint as vLLM loads it (a run or checkpoint only)
    OUT/answers.jsonl    a line for each question; a second start goes on where it ends
    OUT/numbers.json     every number, {name: [mean, standard error]}, null for the error of a single question
    OUT/report.html      the page
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_plugin.config import Config, ConfigError, as_config_error
from megatron_plugin.data import BadLines, Conversation, Prompt, PromptSet, encode_prompts, load_tokenizer, read_conversations
from megatron_plugin.data.claim import claim, file_sha256, weights_digest
from megatron_plugin.data.scores import ScoreFile, read_scores, summarise
from megatron_plugin.report.page import cell, write_page
from megatron_plugin.rollout.engine import Completion, SamplingParams
from megatron_plugin.rollout.fleet import Fleet, Request
from megatron_plugin.rollout.rewards import Reward, RewardResult, RewardSample, make_reward
from megatron_plugin.rollout.vllm_http import start_engine
from megatron_plugin.rollout.vllm_process import EngineOptions
from megatron_plugin.trainer.answer_numbers import Answers, answers_page, numbers_json, summed_up
from megatron_plugin.trainer.batch import is_right
from megatron_plugin.trainer.convert import export_model
from megatron_plugin.trainer.hf_engine import end_ids, fill, hf_engine_options, started
from megatron_plugin.trainer.scoring import Task, score_with_checkpoint, score_with_directory
from megatron_plugin.trainer.world import process_group

__all__ = ["EvalTask", "evaluate_file"]

BATCH = 64
"""Questions asked at once: what a kill loses."""
OF_ANSWERS = ("n", "temperature", "top_p", "max_tokens", "reward", "seed", "samples")


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """What is asked."""

    data: Path
    out: Path
    samples: int = 0
    """Lines from the beginning of the file; 0: all."""
    n: int = 4
    """Answers drawn per question, beside a greedy one; 0: the greedy one alone."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    reward: str = "numeric"
    """A name of make_reward; an answer is right where it is above 0."""
    context: int = 0
    """Tokens of prompt and answer; 0: the model's, at most 32768."""
    memory: float = 0.0
    """Share of the GPU's memory, or GiB of key-value cache on a CPU; 0: 0.9, or 0.25."""
    tensor: int = 1
    """GPUs that share the model."""
    seed: int = 0


def evaluate_file(task: EvalTask, model: Path, overrides: Sequence[str] = (), *, world_size: int = 1, answers: bool = True) -> None:
    """Every rank calls it; rank 0 draws and writes.  model: a run, a checkpoint, or a Hugging Face directory.

    overrides: the layout in which a checkpoint is scored and exported.  answers=False: NLL and cll alone, without vLLM.
    CheckpointError, ConfigError or DataError for what cannot be used; EngineLostError when vLLM does not come up."""
    finished = (model / "config.json").is_file()
    if finished and (overrides or world_size > 1):
        got = f"overrides ({overrides[0]})" if overrides else "several ranks"
        raise ConfigError(f"{model} is a Hugging Face directory, which one process scores; got {got}, expected a run directory or checkpoint beside that")
    if answers:
        _check_sampling(task)  # before the checkpoint is scored, which may take hours
    if finished:
        score_with_directory(Task(task.data, task.out / "score", samples=task.samples), model)
        torch.cuda.empty_cache()  # the GPU is vLLM's now
    else:
        model, leads = _from_checkpoint(task, model, overrides, world_size, export=answers)
        if not leads:
            return
    parts = [f"# {cell(task.data.name)} under {cell(str(model))}", *_scored(task)]
    numbers: dict[str, Any] = {}
    if answers:
        answering = _Answering(task, model)
        found = answering.run()
        parts += [*answers_page(found), f"Asked: {answering.asked}."]
        numbers = {name: list(value) for name, value in found.numbers.items()} | {name: [count, None] for name, count in answering.counts.items()}
        print("\n".join(f"{name:<22} {mean:.4f} ± {spread:.4f}" for name, (mean, spread) in found.numbers.items()))
    if (score := task.out / "score" / "scores.jsonl").is_file():
        means = summarise(read_scores(score), worst=1).means
        numbers |= {"nll": [-means["logp"], None], "cll": [means["cll"], None]}
        print(f"{'nll, cll':<22} {-means['logp']:.4f}, {means['cll']:+.4f} nats")
    (task.out / "numbers.json").write_text(numbers_json(numbers))
    write_page(task.out / "report.html", "\n\n".join(parts), title=f"{task.data.name} under {model}")
    print(f"{task.out}: report.html numbers.json{' answers.jsonl' if answers else ''}", flush=True)


def _from_checkpoint(task: EvalTask, model: Path, overrides: Sequence[str], world_size: int, *, export: bool) -> tuple[Path, bool]:
    """Score and export; (the exported directory, whether this rank goes on).  One process group serves both."""
    with process_group(Config()):
        leads = dist.get_rank() == 0
        score_with_checkpoint(Task(task.data, task.out / "score", samples=task.samples), model, overrides, world_size=world_size)
        layout = [override for override in overrides if override.startswith("parallel.")]
        if export and not (task.out / "hf" / "config.json").is_file():
            export_model(model, task.out / "hf", layout, world_size=world_size)
    return task.out / "hf", leads


def _scored(task: EvalTask) -> list[str]:
    """The page of `score`, as a part of this one."""
    report = task.out / "score" / "report.md"
    return [report.read_text("utf-8").replace("](cll.png)", "](score/cll.png)").partition("\n")[2]] if report.is_file() else []


def _check_sampling(task: EvalTask) -> None:
    """ConfigError for what vLLM would refuse question by question."""
    if not 0 < task.top_p <= 1:
        raise ConfigError(f"got {task.top_p}, expected top_p above 0, and 1 for all tokens", "--top-p")
    if task.n and not 0 < task.temperature <= 2:
        raise ConfigError(f"got {task.temperature}, expected above 0 and at most 2, the highest that vLLM takes; --n 0 draws greedy answers alone",
                          "--temperature")  # fmt: skip


def _first_lines(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """Of the first `count` lines of the file, unusable ones counted, as `score` takes them; 0: all."""
    return [c for c in conversations if not count or int(c.source.rpartition(":")[2]) <= count]


class _Answering:
    def __init__(self, task: EvalTask, model: Path):
        """Everything that can be wrong is found before the engine is started, which takes half a minute."""
        self.task, self.tokenizer = task, load_tokenizer(model)
        ends = end_ids(self.tokenizer, model)
        if not ends:
            raise ConfigError(f"{model}: got no end token in tokenizer or config.json, expected one: every answer would be cut off")
        with as_config_error("eval"):
            self.options: EngineOptions = hf_engine_options(
                model, context=task.context, memory=task.memory, tensor=task.tensor, seed=task.seed, log=str(task.out / "engine.log"),
                max_num_seqs=max(128, task.n),
            )  # fmt: skip
            common = dict(max_tokens=task.max_tokens, stop_token_ids=ends)
            self.greedy = SamplingParams(temperature=0.0, **common)
            self.sampled = SamplingParams(n=max(1, task.n), temperature=task.temperature, top_p=task.top_p, **common)
            self.reward: Reward = make_reward(task.reward)
        self.model, self.version = model, 1
        self.asked, self.counts = "", {}
        """What became of the lines of the file, in words and as numbers."""

    def run(self) -> Answers:
        task = self.task
        wanted = {name: getattr(task, name) for name in OF_ANSWERS} | {"context": self.options.max_model_len}
        wanted |= {"model": str(self.model.resolve()), "weights": weights_digest(self.model)}
        claim(task.out / "eval.json", wanted | {"data": str(task.data.resolve()), "sha256": file_sha256(task.data)}, kind="answers")
        prompts, file = self._prompts(), ScoreFile(task.out / "answers.jsonl")
        try:
            if file.lines < len(prompts):
                with started(self.options, start_engine) as engine:
                    self._ask(Fleet([engine], timeout_s=600.0), prompts.prompts, file)
        finally:
            file.close()
            self.reward.close()
        return summed_up(read_scores(file.path), n=task.n)

    def _prompts(self) -> PromptSet:
        bad = BadLines("skip", 1.0)
        conversations = _first_lines(read_conversations(self.task.data, bad_lines=bad), self.task.samples)
        prompts = encode_prompts(conversations, self.tokenizer, longest=self.options.max_model_len - self.task.max_tokens, bad_lines=bad)
        self.asked = f"{prompts}; {len(bad)} lines cannot be used"
        self.counts = {"questions": len(prompts), "lines left out": len(prompts.too_long) + len(prompts.unasked) + len(bad)}
        print(self.asked, flush=True)
        return prompts

    def _ask(self, fleet: Fleet, prompts: Sequence[Prompt], file: ScoreFile) -> None:
        while file.lines < len(prompts):
            first = file.lines
            batch = prompts[first : first + BATCH]
            asked = [Request((first + i, "greedy"), p.token_ids, self.greedy) for i, p in enumerate(batch)]
            if self.task.n:
                seeds = [(self.task.seed << 24) + first + i for i in range(len(batch))]
                asked += [
                    Request((first + i, "sampled"), p.token_ids, replace(self.sampled, seed=seed)) for i, (p, seed) in enumerate(zip(batch, seeds, strict=True))
                ]
            completions, refused = self._complete(fleet, asked)
            file.append(self._lines(first, batch, completions, refused))
            print(f"{file.lines} of {len(prompts)} questions answered", flush=True)

    def _complete(self, fleet: Fleet, asked: Sequence[Request]) -> tuple[dict[Any, list[Completion]], dict[Any, str]]:
        """Every request answered or refused, over the engine's deaths; EngineLostError once it cannot be brought back."""
        completions, refused = {}, {}
        while asked:
            generated = fleet.generate(asked)
            completions |= generated.completions
            refused |= generated.refused
            asked = [request for request in asked if request.key in generated.missing]
            if asked:
                fleet.restart_dead()
                self.version += 1
                for engine in fleet.engines:
                    fill(engine, self.options, version=self.version)
        return completions, refused

    def _lines(self, first: int, batch: Sequence[Prompt], completions: dict[Any, list[Completion]], refused: dict[Any, str]) -> list[dict[str, Any]]:
        """Of answers.jsonl."""
        lines = []
        for number, prompt in enumerate(batch, first):
            line = {"line": number + 1, "source": prompt.source, "prompt": prompt.text, "reference": prompt.reference}
            for kind in ("greedy", "sampled"):
                if (number, kind) in refused:
                    line["refused"] = refused[number, kind]
                elif (number, kind) in completions:
                    judged = self._judged(prompt, completions[number, kind])
                    line[kind] = judged[0] if kind == "greedy" else judged
            lines.append(line)
        return lines

    def _judged(self, prompt: Prompt, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        texts = [self.tokenizer.decode(completion.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for completion in completions]
        results: Sequence[RewardResult] = self.reward(
            [RewardSample(prompt.text, text, prompt.reference, c.finish_reason) for text, c in zip(texts, completions, strict=True)]
        )
        return [
            {"text": text, "tokens": len(c.token_ids), "finish": c.finish_reason, "reward": r.reward, "right": is_right(r), "cause": r.cause}
            for text, c, r in zip(texts, completions, results, strict=True)
        ]
