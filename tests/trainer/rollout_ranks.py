"""What the rank processes of test_rollouts.py and test_judge.py run: the on-policy trainer as it is, with a small model, over engines in memory.

Puts fakes in the place of the two functions that give `Engines` its engines, and of single methods that shall fail."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from megatron.core import parallel_state

from megatron_plugin.config import load_config
from megatron_plugin.rollout.engine import EngineError
from megatron_plugin.rollout.log import read_rollouts
from megatron_plugin.rollout.rewards import RewardResult
from megatron_plugin.rollout.transports.shm import SharedMemory
from megatron_plugin.trainer import engines as engines_module
from megatron_plugin.trainer.batch import Judged
from megatron_plugin.trainer.judge import Judge
from megatron_plugin.trainer.leaders import Leaders
from megatron_plugin.trainer.onpolicy import OnPolicy
from megatron_plugin.trainer.run import Run, start
from megatron_plugin.trainer.world import seed_everything, world
from tests.rollout.fake_engine import FakeEngine

SMALL = {
    "model.num_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 1, "model.ffn_hidden_size": 64, "model.gated_linear_unit": "true",
    "model.activation_func": "silu", "model.share_embeddings_and_output_weights": "false", "data.bpe_vocab_size": 300, "data.seq_length": 64,
    "train.micro_batch": 4, "train.lr": 1e-2, "train.warmup_steps": 0, "checkpoint.interval": 0, "loss.name": "grpo", "rollout.prompts": 4,
    "rollout.n": 2, "rollout.max_tokens": 16, "rollout.eval_n": 0, "rollout.timeout_s": 3, "rollout.start_timeout_s": 5, "rollout.max_restarts": 1,
    "rollout.reward_timeout_s": 1,
}  # fmt: skip
SERVERS = {"rollout.engine": "server", "rollout.transfer": "shm"}


class Sampler(FakeEngine):
    """Answers "What is 7?" with "#### 7" or a wrong number, one of `right(7, index)`.  What went wrong may be keyed by the question's number, "q7", and be
    an answer with a padding token of the vocabulary: "padding" is refused as VLLMEngine does it, where the request says its size, "stray" never is.

    Says no while it sleeps, as VLLMEngine does.  An update while it samples is a fault of the trainer's: AssertionError."""

    backend = SharedMemory.backend

    def __init__(self, name: str, run: Run, *, right: Callable[[int, int], bool], **options):
        super().__init__(name, version=None, **options)
        self.run, self.right, self.asleep = run, right, False
        self.sent: dict[int, int] = {}
        """Version -> optimizer steps behind its weights."""

    def generate(self, prompt_ids, params, *, timeout_s):
        if self.asleep:
            raise EngineError(f"{self.name}: asleep: call wake() first")
        return super().generate(prompt_ids, params, timeout_s=timeout_s)

    def _answer(self, fault, prompt_ids, params):
        number = int(re.search(r"What is (\d+)", self.run.data.tokenizer.decode(prompt_ids))[1])
        fault = fault or self.faults.get(f"q{number}")
        if fault == "padding" and params.vocab_size == self.run.data.vocab_size:
            raise EngineError(f"{self.name}: got token {params.vocab_size} in a completion")
        if fault == "die":
            self.release.wait(0.15)  # when the others of the batch have their answers
            while self.in_flight > 1 and not self.release.wait(0.05):
                pass
        completions = super()._answer(fault, prompt_ids, params)
        if fault in ("padding", "stray"):
            return [replace(c, token_ids=(self.run.data.vocab_size,), logprobs=(-1.5,)) for c in completions]
        if fault:
            return completions
        texts = [f"#### {number if self.right(number, index) else number + 1}" for index in range(len(completions))]
        tokens = [(*self.run.data.tokenizer.encode(text), self.run.data.tokenizer.eos_token_id) for text in texts]
        return [replace(c, token_ids=ids, logprobs=(-1.5,) * len(ids)) for c, ids in zip(completions, tokens, strict=True)]

    def begin_update(self, version):
        assert not self.in_flight, f"{self.name}: an update while {self.in_flight} requests run"
        super().begin_update(version)

    def finish_update(self):
        super().finish_update()
        self.sent[self.weight_version] = self.run.step

    def abort_update(self):
        self.said.append("abort")

    def sleep(self, level=1):
        super().sleep(level)
        self.asleep = True

    def wake(self):
        super().wake()
        self.asleep = False


def write_questions(folder: Path, name: str, count: int, *, long: int | None = None, long_answer: int | None = None) -> Path:
    """name.jsonl with "What is 0?" ... in `folder`; question number `long` leaves no room for an answer, answer number `long_answer` fills more than a row."""
    lines = [
        {"question": f"What is {i}?" + " Think well." * (20 * (i == long)), "answer": "so " * (120 * (i == long_answer)) + f"#### {i}"} for i in range(count)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(group, overrides: dict):
    return load_config("configs/debug_cpu.yaml", [f"{key}={value}" for key, value in {**SMALL, **overrides}.items()], world_size=group.size())


@contextlib.contextmanager
def one_world(config) -> Iterator[None]:
    """`world`, or the one that is there: each costs some fifty threads that never end."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.nullcontext() if parallel_state.model_parallel_is_initialized() else world(config):
        seed_everything(config, 0)
        yield


def several(group, *, base: dict, calls: dict[str, tuple[str, dict]]) -> dict:
    """{name: what module:function returns}, all in one world; `base`: overrides of all."""
    found = {}
    with one_world(config_of(group, base)):
        for number, (name, (path, arguments)) in enumerate(calls.items()):
            module, _, function = path.partition(":")
            overrides = {**base, "run_dir": f"{base['run_dir']}{number}", **arguments.get("overrides", {})}
            found[name] = getattr(importlib.import_module(module), function)(group, **{**arguments, "overrides": overrides})
    return found


@contextlib.contextmanager
def on_policy(group, overrides: dict, *, right: Callable[[int, int], bool] = lambda number, index: index == 0, faults=None, **options) -> Iterator[OnPolicy]:
    """faults: by the engine's name, that of its url, or fake0, fake1 by rank."""
    config, made = config_of(group, overrides), []

    def engine(name: str) -> Sampler:
        made.append(Sampler(name, run, right=right, faults=(faults or {}).get(name), **options))
        return made[-1]

    with (
        one_world(config),
        patch.object(engines_module, "start_engine", lambda options: engine(f"fake{group.rank()}")),
        patch.object(engines_module, "connect_engine", lambda url, expected, **_: engine(url)),
    ):  # fmt: skip
        run = start(config)
        source = OnPolicy(run)
        source.fakes = made
        try:
            yield source
        finally:
            for fake in made:
                fake.release.set()
            source.close()
            del source
            gc.collect()  # with it go the leaders' groups, whose threads would else add up


def outcome(act: Callable[[], object]) -> tuple[str, str, float]:
    """(type, message and exit code of what `act` raises, "" without; seconds)."""
    begin = time.monotonic()
    try:
        act()
    except Exception as error:
        return type(error).__name__, f"{error} (exit {getattr(error, 'exit_code', 1)})", time.monotonic() - begin
    return "", "", time.monotonic() - begin


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """What is logged inside."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("megatron_plugin")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def _lines(source: OnPolicy) -> list[dict]:
    return list(read_rollouts(source.rollouts.log.path))


# -- test_rollouts.py -------------------------------------------------------------------------------------------------------------------------------


def sleeps(group, *, overrides: dict) -> dict:
    """An evaluation and a rollout batch at the same step, the engines asleep in between."""
    with on_policy(group, overrides) as source:
        source.rollouts.engines.sleeps = True  # which a CPU has not
        evaluated = source.rollouts.evaluate()
        groups, metrics = source.rollouts.batch()
        found = {"evaluated": evaluated, "metrics": metrics, "answers": [len(g.judged.completions) for g in groups], "words": list(source.fakes[0].said)}
        words = [word for word in found["words"] if isinstance(word, str)]
        return found | {"words": words, "sent": source.fakes[0].sent}


def ahead(group, *, overrides: dict, faults: dict, steps: int, evaluates_at: int = -1) -> list[dict]:
    """Batches with max_staleness=1 while engines die: of each the prompts in order, the versions of each group, the metrics, and the position's prompts."""
    with on_policy(group, overrides, faults=faults, delay_s=0.05) as source:
        rollouts, found = source.rollouts, []
        for step in range(steps):
            source.run.step = step
            groups, metrics = rollouts.batch()
            sent = {version: at for fake in source.fakes for version, at in fake.sent.items()}
            behind = [step - sent[c.weight_version] for g in groups for c in g.judged.completions]
            found.append({
                "sources": [g.judged.prompt.source for g in groups], "versions": [{c.weight_version for c in g.judged.completions} for g in groups],
                "metrics": metrics, "behind": sum(behind) / len(behind), "position": rollouts.position()["consumed"],
                "restarts": [fake.restarts for fake in source.fakes], "drawn": rollouts.order.consumed,
            })  # fmt: skip
            if step == evaluates_at:
                source.run.step += 1
                rollouts.evaluate()  # new weights while the next batch is sampled
        return found


def refuses(group, *, overrides: dict, numbers: list[int]) -> dict:
    """A batch of which the engine refuses some prompts."""
    faults = {f"fake{rank}": {f"q{number}": "refuse" for number in numbers} for rank in range(2)}
    with on_policy(group, overrides, faults=faults) as source, warnings() as said:
        groups, metrics = source.rollouts.batch()
        return {"sources": [g.judged.prompt.source for g in groups], "metrics": metrics, "said": said}


def evaluates(group, *, overrides: dict, refused: list[int]) -> dict:
    """An evaluation where every answer that comes is right."""
    faults = {f"fake{rank}": {f"q{number}": "refuse" for number in refused} for rank in range(2)}
    with on_policy(group, overrides | {"rollout.eval_n": 2}, right=lambda number, index: True, faults=faults) as source:
        return source.rollouts.evaluate()


def _broken(name: str, source: OnPolicy, error: Exception):
    """The method that fails, for as long as the context lasts."""
    rollouts = source.rollouts
    owner, method = {"judge": (rollouts.judge, "judge"), "log": (rollouts.log, "add"), "sleep": (rollouts.engines.fleet, "sleep")}.get(
        name, (rollouts.engines.transport, name)
    )

    def fail(*_, **__):
        raise error

    return patch.object(owner, method, fail)


def one_leader_fails(group, *, overrides: dict, cases: list[str]) -> dict:
    """What each rank is told where the second leader's judge, sleep or transport fails; then two batches that it cannot log, and one as if nothing had been."""
    with on_policy(group, overrides) as source:
        rollouts, found = source.rollouts, {}
        rollouts.engines.sync.bucket_bytes = 2048  # several buckets
        for name in cases:
            sends = name not in ("judge", "sleep")
            rollouts.engines.sleeps = name == "sleep"
            source.run.step += sends  # so that there is something to send
            error = OSError(28, f"no space left for {name}")
            with _broken(name, source, error) if group.rank() == 1 else contextlib.nullcontext():
                found[name] = outcome((lambda: rollouts.engines.refresh(source.run.step)) if sends else rollouts.batch)
        rollouts.engines.sleeps = False
        with _broken("log", source, OSError(28, "no space left")) if group.rank() == 1 else contextlib.nullcontext():
            found["unlogged"] = [rollouts.batch()[1]["log/rollouts_failed"] for _ in range(2)]
        groups, metrics = rollouts.batch()
        return found | {"after": ([len(g.judged.completions) for g in groups], metrics["rollout/samples"], sorted(source.fakes[0].sent.values())[-1])}


# -- test_judge.py ----------------------------------------------------------------------------------------------------------------------------------


def mean_of_leaders(group, *, overrides: dict, rewards: list[list[float]], unanswered: int) -> tuple[float, float]:
    """(rollout/reward_mean, mean_reward with `unanswered` more) where each rank is a leader and has one group of these rewards."""
    config = config_of(group, overrides | {"rollout.engines": group.size(), "rollout.prompts": group.size()})
    with one_world(config):
        run = SimpleNamespace(config=config, data=SimpleNamespace(tokenizer=None), loss=SimpleNamespace(params={}))
        judge = Judge(run, Leaders(group.size(), timeout_s=20))
        mine = rewards[group.rank()]
        completion = SimpleNamespace(token_ids=(1,), finish_reason="stop")
        results = [RewardResult(reward, "scored") for reward in mine]
        prompt = SimpleNamespace(source="x:1")
        judged = {group.rank(): [Judged(prompt, [completion] * len(mine), [""] * len(mine), results, mine)]}
        return judge._metrics(judged)["rollout/reward_mean"], judge.mean_reward(judged, unanswered)


def dynamic_sampling(group, *, overrides: dict, teaching: list[int]) -> dict:
    """A batch of groups that teach nothing but those of the questions `teaching`; the lines of rollouts.jsonl."""
    with on_policy(group, overrides, right=lambda number, index: index == 0 and number in teaching) as source:
        groups, metrics = source.rollouts.batch()
        found = {"sources": [g.judged.prompt.source for g in groups], "zero": [not any(g.advantages) for g in groups], "metrics": metrics}
        lines = _lines(source)
        return found | {"lines": [(line["source"], line["advantage"]) for line in lines], "position": source.rollouts.position()["consumed"]}


def demonstrated(group, *, overrides: dict) -> tuple[list[str], list[str]]:
    """Sources of (prompts, demonstrations) of an srft run."""
    config = config_of(group, overrides)
    with one_world(config):
        data = start(config).data
        return [p.source for p in data.prompts.prompts], [s.source for s in data.train.samples]
