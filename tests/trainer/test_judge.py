"""Groups that teach and groups that do not, demonstrations among the answers."""

from types import SimpleNamespace

import pytest

from megatron_plugin.config import load_config
from megatron_plugin.data import Prompt, RowOrder
from megatron_plugin.losses.binding import bind
from megatron_plugin.rollout.engine import Completion
from megatron_plugin.trainer.judge import Judge
from megatron_plugin.trainer.leaders import Leaders
from tests.spawn import on_ranks
from tests.trainer.rollout_ranks import write_questions

RANKS = "tests.trainer.rollout_ranks"
TEXTS = ("#### 3", "#### 4", "three")


class Alone(Leaders):
    """One rank, its own leader, without a process group."""

    def __init__(self):
        self.leads, self.replicas, self.index, self.count, self.replica = True, 1, 0, 1, 0

    def everyone(self, value):
        return [value]

    def on_leaders(self, act):
        return act()


def srft(preset: str, reward: str = "numeric") -> Judge:
    config = load_config("configs/srft.yaml", [f"loss.preset={preset}", f"rollout.reward={reward}", "rollout.n=2", "rollout.prompts=1"])
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: TEXTS[ids[0]])
    return Judge(SimpleNamespace(config=config, data=SimpleNamespace(tokenizer=tokenizer), loss=bind("srft", preset=preset)), Alone())


def group(judge: Judge, *texts: str, demonstration: str = "1+2=3\n#### 3"):
    completions = [Completion((TEXTS.index(text),), (-1.0,), "stop", 0) for text in texts]
    prompt = Prompt((1,), "1+2?", demonstration, "x.jsonl:1")
    judged = judge.judge([(prompt, completions)])
    groups, _ = judge.groups({0: judged})
    return judged[0], groups[0][0]


@pytest.mark.parametrize("preset, answers, demonstration", [
    ("paper", [0.57735, -1.15470], 0.57735),  # of 1, 0 and the demonstration's 1: mean 2/3, deviation 0.57735
    ("code", [0.70711, -0.70711], 0.70711),  # of 1 and 0: mean 1/2, deviation 0.70711
])  # fmt: skip
def test_srft_demonstration_in_the_group_of_its_prompt(preset, answers, demonstration):
    _, found = group(srft(preset), "#### 3", "#### 4")
    assert found.advantages == pytest.approx(answers, abs=1e-4) and found.demonstration == pytest.approx(demonstration, abs=1e-4)


@pytest.mark.parametrize("preset, answers, demonstration", [("paper", [-0.57735] * 2, 1.15470), ("code", [0, 0], 1.0)])
def test_srft_group_of_wrong_answers_teaches_by_its_demonstration(preset, answers, demonstration):
    judged, found = group(srft(preset), "#### 4", "three")
    assert judged.teaches and found.advantages == pytest.approx(answers, abs=1e-4) and found.demonstration == pytest.approx(demonstration, abs=1e-4)
    assert not group(srft(preset), "#### 3", "#### 3")[0].teaches, "all as right as the demonstration"


def test_srft_demonstration_is_judged_by_the_reward_of_the_answers():
    """Not worth 1 by decree: where a right answer is worth 2, so is the demonstration, and one that the reward finds wrong is worth 0."""
    judge = srft("paper", "{numeric: 2.0}")
    judged, found = group(judge, "#### 3", "#### 3")
    assert judged.demonstration == 2.0 and list(judged.rewards) == [2.0, 2.0] and found.demonstration == 0
    assert group(judge, "#### 3", "three", demonstration="no number")[0].demonstration == 0.0


def test_srft_prompts_are_those_that_have_a_demonstration(tmp_path):
    """One that is dropped as too long takes its prompt with it: nothing could join its group."""
    overrides = {"loss.name": "srft", "data.overlong": "drop", "data.train": write_questions(tmp_path, "train", 5, long_answer=2), "run_dir": tmp_path / "run"}
    prompts, demonstrations = on_ranks(1, RANKS, "demonstrated", overrides=overrides)[0]
    assert prompts == demonstrations == [f"{tmp_path}/train.jsonl:{i}" for i in (1, 2, 4, 5)]


@pytest.mark.parametrize("times, taught", [(1, 2), (3, 4)])
def test_dynamic_sampling_keeps_groups_that_teach(times, taught, tmp_path):
    """Four groups a step; of the prompts in their order some teach.  What was sampled beyond is logged, with no advantage."""
    order = RowOrder(16, 4, 1234)
    asked = [order.next_step() for _ in range(4)]
    teaching = [asked[0][3], asked[1][1], asked[2][0], asked[2][2], asked[2][3]]
    files = {f"data.{key}": write_questions(tmp_path, key, 16) for key in ("train", "prompts", "eval")}
    overrides = files | {"rollout.dynamic_sampling": times, "run_dir": tmp_path / "run"}
    found = on_ranks(1, RANKS, "dynamic_sampling", overrides=overrides, teaching=teaching)[0]
    batches = 1 + min(times, 2)  # no further batch once every group teaches
    chosen = teaching[:taught] + [i for i in asked[0] if i not in teaching][: 4 - taught]
    sampled = [i for batch in asked[:batches] for i in batch]
    assert found["sources"] == [f"{tmp_path}/prompts.jsonl:{i + 1}" for i in chosen] and found["zero"] == [i not in teaching for i in chosen]
    assert found["position"] == 4 * batches and found["metrics"]["rollout/zero_groups"] == 1 - taught / 4
    lines = dict(found["lines"])
    assert len(found["lines"]) == 2 * len(sampled) and set(lines) == {f"{tmp_path}/prompts.jsonl:{i + 1}" for i in sampled}
    assert {source for source, advantage in found["lines"] if advantage is None} == set(lines) - set(found["sources"])
