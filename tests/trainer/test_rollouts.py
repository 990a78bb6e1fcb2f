"""Rollout batches over engines that sleep, die, refuse, and leaders that fail: real ranks, a real trainer, engines in memory."""

from collections import Counter

import pytest

from megatron_plugin.data import RowOrder
from tests.spawn import on_ranks
from tests.trainer.rollout_ranks import SERVERS, write_questions

RANKS = "tests.trainer.rollout_ranks"
FIRST, SECOND = "http://127.0.0.1:1", "http://127.0.0.1:2"
AHEAD = {**SERVERS, "rollout.max_staleness": 1, "loss.tis": 2, "rollout.max_restarts": 2}
REWARDS = {"first below 0": [[-1.0, -0.5], [0.75]], "second below 0": [[0.75], [-1.0, -0.5]]}
BROKEN = ["judge", "sleep", "open", "start_bucket", "write", "deliver", "end_bucket"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("questions")
    files = {f"data.{key}": write_questions(folder, name, 16) for key, name in (("train", "expert"), ("prompts", "prompts"))}
    return files | {"data.eval": write_questions(folder, "heldout", 4), "run_dir": folder / "run"}


def test_engines_that_slept_with_the_newest_weights_are_woken(data, tmp_path):
    """An evaluation before the first step ends with a rest; the first batch needs no update, and engines that sleep refuse every prompt."""
    found = on_ranks(1, RANKS, "sleeps", overrides=data | {"run_dir": tmp_path / "run", "rollout.sleep": "true"})[0]
    assert found["evaluated"] == {"eval/heldout_reward_greedy": 1.0}
    assert found["answers"] == [2] * 4 and found["metrics"]["rollout/refused"] == 0
    assert found["words"] == ["sleep 1", "wake", "sleep 1"] and found["sent"] == {0: 0}, "the weights of step 0 were sent once"


def test_a_server_taken_for_dead_that_has_the_newest_weights_gets_them_again(data, tmp_path):
    """It kept its version, and versions only go up."""
    overrides = {"run_dir": tmp_path / "run", **SERVERS, "rollout.url": "[http://127.0.0.2:1]"}  # loopback is all of 127.0.0.0/8
    found = on_ranks(1, "tests.trainer.policy_ranks", "lost_between", overrides=data | overrides)[0]
    assert found == {"answers": [2] * 4, "sent": {0: 0, 1: 0}, "restarts": 1}


@pytest.mark.parametrize("urls, number, restarts, stale", [
    ([FIRST], 6, [1], 3 / 4),  # the only one, in the batch ahead: what it still owed is asked again with newer weights
    ([FIRST, SECOND], 3, [1, 0], 1.0),  # the other one takes over
], ids=["one", "two"])  # fmt: skip
def test_an_engine_lost_while_the_batch_ahead_is_sampled(data, tmp_path, urls, number, restarts, stale):
    """The fake refuses updates while it samples.  Every prompt comes once, in order; a resumed run goes on behind what was handed out."""
    overrides = {"run_dir": tmp_path / "run", "rollout.url": f"[{','.join(urls)}]", **AHEAD}
    batches = on_ranks(1, RANKS, "ahead", overrides=data | overrides, faults={FIRST: {number: "die"}}, steps=4)[0]
    order = RowOrder(16, 4, 1234)
    expected = [[f"{data['data.prompts']}:{i + 1}" for i in order.next_step()] for _ in batches]
    assert [batch["sources"] for batch in batches] == expected
    assert [batch["position"] for batch in batches] == [4, 8, 12, 16]
    assert all(len(versions) == 1 for batch in batches for versions in batch["versions"]), "a group of two versions"
    assert [batch["metrics"]["rollout/staleness"] for batch in batches] == [batch["behind"] for batch in batches] == [0, stale, 1, 1]
    assert [batch["metrics"]["rollout/lost_engines"] for batch in batches] == [0, 1, 0, 0] and batches[-1]["restarts"] == restarts


def test_nothing_is_sampled_ahead_of_a_checkpoint(data, tmp_path):
    """A resumed run can only draw it with the checkpoint's weights, so the undisturbed one does too."""
    overrides = {"run_dir": tmp_path / "run", "rollout.url": f"[{FIRST}]", "checkpoint.interval": 2, "train.steps": 5, **AHEAD}
    batches = on_ranks(1, RANKS, "ahead", overrides=data | overrides, faults={}, steps=5)[0]
    assert [batch["behind"] for batch in batches] == [0, 1, 0, 1, 0]
    assert [batch["position"] for batch in batches] == [4, 8, 12, 16, 20]


def test_an_evaluation_waits_for_the_batch_ahead(data, tmp_path):
    """It sends new weights: the requests in flight must have ended, and their answers are of the weights before."""
    overrides = {"run_dir": tmp_path / "run", "rollout.url": f"[{FIRST}]", **AHEAD}
    overrides |= {"train.steps": 2}
    batches = on_ranks(1, RANKS, "ahead", overrides=data | overrides, faults={}, steps=2, evaluates_at=0)[0]
    assert [batch["behind"] for batch in batches] == [0, 1] and batches[1]["metrics"]["rollout/staleness"] == 1
    assert [batch["metrics"]["rollout/engines_healthy"] for batch in batches] == [1, 1]
    assert [batch["drawn"] for batch in batches] == [8, 8], "a batch behind the last step was sampled"


@pytest.fixture(scope="module")
def leaders(data) -> dict:
    """Of two leaders with an engine each."""
    refused = RowOrder(16, 4, 1234).next_step()[1:3]  # one prompt of each leader
    calls = {
        "refuses": (f"{RANKS}:refuses", {"numbers": refused}),
        "evaluates": (f"{RANKS}:evaluates", {"overrides": {"data.eval": write_questions(data["run_dir"].parent, "long", 5, long=3)}, "refused": [1]}),
        **{f"mean {name}": (f"{RANKS}:mean_of_leaders", {"rewards": rewards, "unanswered": 2}) for name, rewards in REWARDS.items()},
        "fails": (f"{RANKS}:one_leader_fails", {"cases": BROKEN}),
    }
    return {"refused": refused, "ranks": on_ranks(2, RANKS, "several", base=data | {"rollout.engines": 2}, calls=calls)}


def test_refused_prompts_are_counted_over_leaders_and_logged_with_their_cause(data, leaders):
    found = [rank["refuses"] for rank in leaders["ranks"]]
    asked = Counter(f"{data['data.prompts']}:{i + 1}" for i in RowOrder(16, 4, 1234).next_step() if i not in leaders["refused"])
    assert Counter(source for rank in found for source in rank["sources"]) == asked
    for number, rank in enumerate(found):
        assert rank["metrics"]["rollout/refused"] == 2 and rank["metrics"]["rollout/samples"] == 4
        said, = rank["said"]
        assert f"1 prompts refused, the first, (step, place) (4, {number + 1}): fake{number}: the prompt has" in said and "leaves no room" in said


def test_held_out_prompts_without_an_answer_are_worth_nothing(leaders):
    """Five: one too long to be asked, one refused, three answered rightly."""
    for rank in leaders["ranks"]:
        assert rank["evaluates"] == {"eval/heldout_reward_greedy": 3 / 5, "eval/heldout_reward_sampled": 3 / 5}


@pytest.mark.parametrize("case", REWARDS)
def test_mean_reward_over_leaders_may_be_negative(leaders, case):
    """Counter's + drops what is not above 0: the leader with a loss would count for nothing."""
    for rank in leaders["ranks"]:
        mean, with_unanswered = rank[f"mean {case}"]
        assert mean == pytest.approx(-0.25) and with_unanswered == pytest.approx(-0.15)


@pytest.mark.parametrize("broken", BROKEN)
def test_what_fails_on_one_leader_ends_every_rank(leaders, broken):
    """At once, not at the timeout of a collective."""
    (kind, said, seconds), own = (rank["fails"][broken] for rank in leaders["ranks"])
    assert own[:2] == ("OSError", f"[Errno 28] no space left for {broken} (exit 1)")
    assert (kind, said) == ("RemoteError", f"OSError: {own[1]}") and seconds < 5


def test_a_log_that_one_leader_cannot_write_is_counted(leaders):
    """And ends nothing: the batch is trained on."""
    for rank in leaders["ranks"]:
        assert rank["fails"]["unlogged"] == [1.0, 2.0]


def test_after_a_failure_every_rank_is_where_the_others_are(leaders):
    """No collective is left half done, no engine without the newest weights."""
    for rank in leaders["ranks"]:
        assert rank["fails"]["after"] == ([2, 2], 8.0, 5)
