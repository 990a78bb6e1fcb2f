"""Rewards to advantages against hand-checked numbers; groups that cannot teach; whole answers that another policy drew."""

import math

import pytest
import torch

from megatron_plugin.losses.advantages import (
    augmented_advantages,
    group_advantages,
    informative,
    overlong_penalty,
    reward_sums,
    sequence_weight,
)

HAND = {  # rewards of a group of 4 -> advantages, to six decimals
    "one right": ([1, 0, 0, 0], [1.499997, -0.499999, -0.499999, -0.499999]),
    "half right": ([1, 1, 0, 0], [0.866024, 0.866024, -0.866024, -0.866024]),
    "all right": ([1, 1, 1, 1], [0, 0, 0, 0]),
    "all wrong": ([0, 0, 0, 0], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("case", HAND)
def test_hand_numbers(case):
    """A deviation with n instead of n - 1 would give 1.732, -.577: a bug seen in other trainers."""
    rewards, expected = HAND[case]
    got = group_advantages(torch.tensor([rewards], dtype=torch.float32))
    assert got.shape == (1, 4) and got.dtype == torch.float64 and got[0].tolist() == pytest.approx(expected, abs=6e-7)
    (ragged,) = group_advantages([rewards])
    assert torch.equal(ragged, got[0])


def test_eps_of_trl():
    assert group_advantages([[1, 0, 0, 0]], eps=1e-4)[0][0].item() == pytest.approx(0.75 / (0.5 + 1e-4), abs=1e-12)


def test_equal_rewards_are_exactly_zero():
    """0.1 has no exact mean: three of them sum to 0.30000000000000004."""
    for scale in ("group", "batch", "none"):
        groups = group_advantages([[0.1] * 3, [0.7] * 7, [1.0, 0.0]], scale=scale)
        assert not groups[0].any() and not groups[1].any() and groups[2].all()


def test_a_group_of_one_keeps_its_reward():
    assert [a.item() for a in group_advantages([[1.0], [0.0], [-0.5]])] == pytest.approx([1.0, 0.0, -0.5], abs=1e-6)
    assert group_advantages([[0.25]], scale="none")[0].item() == 0.25


def test_dr_grpo_divides_by_nothing():
    assert group_advantages([[1, 0, 0, 0], [2, 0]], scale="none")[0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_the_batch_deviation_is_that_of_all_rewards_on_all_ranks():
    first, second = [[1.0, 0.0, 0.0], [1.0, 1.0]], [[0.0, 0.5, 0.25, 1.0]]
    every = torch.tensor([1.0, 0, 0, 1, 1, 0, 0.5, 0.25, 1], dtype=torch.float64)
    sums = reward_sums(first) + reward_sums(second)  # as an all-reduce adds them
    got = [*group_advantages(first, scale="batch", sums=sums), *group_advantages(second, scale="batch", sums=sums)]
    alone = group_advantages(first + second, scale="batch")
    for group, advantage, same in zip(first + second, got, alone, strict=True):
        rewards = torch.tensor(group, dtype=torch.float64)
        torch.testing.assert_close(advantage, (rewards - rewards.mean()) / (every.std() + 1e-6), atol=1e-12, rtol=0)
        assert torch.equal(advantage, same)
    assert not torch.allclose(group_advantages(first, scale="batch")[0], got[0]), "the other rank's rewards count"


def test_a_rank_without_groups():
    assert reward_sums([]).tolist() == [0, 0, 0] and group_advantages([]) == [] and informative([]).shape == (0,)
    assert group_advantages([[0.3]], scale="batch")[0].isfinite().all(), "one reward in the whole step has no deviation"


def test_advantages_do_not_depend_on_the_scale_of_the_reward():
    rewards = torch.rand(5, 8, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, eps=0), group_advantages(100 * rewards + 7, eps=0), atol=1e-11, rtol=0)
    assert group_advantages(rewards).sum(1).abs().max() < 1e-13


def test_demonstrations_join_the_group():
    """SRFT: eight wrong answers and a right demonstration; mean 1/9, deviation 1/3."""
    answers, demos = augmented_advantages([[0.0] * 8, [1.0] * 8], [[1.0], [1.0]])
    assert answers[0].tolist() == pytest.approx([-1 / 3] * 8, abs=1e-6) and demos[0].tolist() == pytest.approx([8 / 3], abs=2e-5)
    assert not answers[1].any() and not demos[1].any()
    ragged, none = augmented_advantages([[1, 0, 0, 0]], [[]])
    assert torch.equal(ragged[0], group_advantages([[1, 0, 0, 0]])[0]) and none[0].shape == (0,)
    joined, shown = augmented_advantages([[0.0, 1.0]], [[1.0, 1.0]])
    assert torch.equal(torch.cat([joined[0], shown[0]]), group_advantages([[0.0, 1.0, 1.0, 1.0]])[0])


def test_demonstrations_against_the_answers_alone():
    """SRFT's released code: 1, 0, 0, 0 have mean 1/4 and deviation 1/2; a deviation of 0, or of one answer, counts as 1."""
    answers, demos = augmented_advantages([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0], [0.25]], [[1.0, 0.0], [1.0], [1.0]], over_answers=True, eps=0)
    assert answers[0].tolist() == [1.5, -0.5, -0.5, -0.5] and demos[0].tolist() == [1.5, -0.5]
    assert answers[1].tolist() == [0, 0] and demos[1].tolist() == [1]
    assert answers[2].tolist() == [0.25] and demos[2].tolist() == [0.75]
    assert augmented_advantages([[0.1] * 3], [[]], over_answers=True)[1][0].shape == (0,)


def test_informative_groups():
    assert informative([[1, 1, 1], [0, 0], [0, 1], [0.1, 0.1, 0.1], [0.5]]).tolist() == [False, False, True, False, True]
    assert informative(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist() == [False, True]


def test_overlong_penalty():
    """DAPO's own numbers: 20480 tokens, the last 4096 of them punished."""
    got = overlong_penalty([0, 16384, 16385, 18432, 20480, 30000], max_tokens=20480, buffer=4096)
    assert got.tolist() == pytest.approx([0, 0, -1 / 4096, -0.5, -1, -1])
    assert overlong_penalty([90], max_tokens=100, buffer=20, factor=0.5).tolist() == [-0.25]
    assert overlong_penalty(torch.tensor([5, 100]), max_tokens=100, buffer=0).tolist() == [0, 0]


OLD, ROLLED = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.2])  # log-ratio 0.7, r = 2.01375
BAD = torch.tensor([-1.5, math.nan])


@pytest.mark.parametrize("arguments, expected", [
    (dict(mode="sequence_tis", bound=3.0), math.exp(0.7)),
    (dict(mode="sequence_tis", bound=1.5), 1.5),
    (dict(mode="sequence_mask", bound=3.0), math.exp(0.7)),
    (dict(mode="sequence_mask", bound=2.0), 0.0),
    (dict(mode="opsm", bound=0.1, advantage=-1.0), 1.0),  # the trainer likes the answer better than the engine did
])  # fmt: skip
def test_weight_of_a_whole_answer(arguments, expected):
    assert sequence_weight(OLD, ROLLED, **arguments) == pytest.approx(expected, rel=1e-6)


def test_opsm_drops_wrong_answers_that_have_drifted():
    """mean(log p_rollout - log p_old) = 0.35 nats."""
    drifted = dict(old_logp_T=ROLLED, rollout_logp_T=OLD, mode="opsm")
    assert sequence_weight(**drifted, bound=0.34, advantage=-1.0) == 0
    assert sequence_weight(**drifted, bound=0.36, advantage=-1.0) == 1
    assert sequence_weight(**drifted, bound=0.34, advantage=1.0) == sequence_weight(**drifted, bound=0.34, advantage=0.0) == 1


def test_a_log_ratio_is_held_to_20_nats():
    assert sequence_weight(OLD, OLD - 50, mode="sequence_mask", bound=1e30) == pytest.approx(math.exp(20))


@pytest.mark.parametrize("call, message", [
    (lambda: group_advantages([[1.0, 0.0]], scale="std"), "got scale='std', expected one of group, batch, none"),
    (lambda: group_advantages([[1.0, math.nan]]), r"group 0 holds \[1.0, nan\], expected finite rewards: which reward function"),
    (lambda: group_advantages([[1.0], []]), r"group 1 has shape \[0\], expected the rewards of one prompt's answers, at least one"),
    (lambda: group_advantages(torch.ones(3)), r"group 0 has shape \[\]"),
    (lambda: augmented_advantages([[1.0]], []), "demonstrations of 0 prompts, expected those of the same 1"),
    (lambda: overlong_penalty([1], max_tokens=10, buffer=11), "got buffer=11, max_tokens=10"),
    (lambda: overlong_penalty([1], max_tokens=10, buffer=1, factor=-1.0), "factor=-1.0, expected"),
    (lambda: sequence_weight(OLD, ROLLED, mode="tis", bound=2.0), "got mode='tis', expected one of sequence_tis, "),
    (lambda: sequence_weight(OLD, ROLLED, mode="sequence_tis", bound=0.0), "got bound=0.0, expected a ratio > 0"),
    (lambda: sequence_weight(OLD, ROLLED, mode="sequence_mask", bound=math.nan), "got bound=nan, expected a ratio > 0"),
    (lambda: sequence_weight(OLD, ROLLED, mode="opsm", bound=-0.1), "got bound=-0.1, expected nats >= 0"),
    (lambda: sequence_weight(OLD, ROLLED[:1], mode="opsm", bound=1.0), r"got old_logp \[2\] and rollout_logp \[1\]"),
    (lambda: sequence_weight(OLD[:0], OLD[:0], mode="opsm", bound=1.0), "at least one token"),
    (lambda: sequence_weight(OLD, BAD, mode="opsm", bound=1.0), "rollout_logp of token 1 is nan, expected a finite"),
])  # fmt: skip
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
