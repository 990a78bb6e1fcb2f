"""The learning-dynamics studies: the exact claims of the table, the model and its cache, the mixture's coefficients, and every study once at tiny settings."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from benchmarks.dynamics import chord_entropy, chord_shift, chord_shift_far, columns, dft_generalise, page, realign, srft_stages, study
from benchmarks.dynamics.learn import Part, Trainer, demonstrations, evaluate, joined, passes, rollouts
from benchmarks.dynamics.model import Size, TinyLlama, draw
from megatron_plugin import TokenInputs, TokenStats, bind
from megatron_plugin.losses.srft import srft

STUDIES = (chord_entropy.STUDY, chord_shift.STUDY, chord_shift_far.STUDY, dft_generalise.STUDY, srft_stages.STUDY, realign.STUDY)
TINY_SIZE = Size(columns.VOCABULARY, width=16, layers=2, heads=2, inner=32)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- a, on the table: what the docstring derives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", chord_entropy.WEIGHTS)
def test_the_table_goes_where_the_gradients_say(weight):
    """Descent ends in q, in one token, and in max(0, 1 - lambda / q); a weight that is another, or not detached, ends elsewhere."""
    expert = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.4, 0.35, 0.2, 0.05], [0.7, 0.2, 0.06, 0.04]], dtype=torch.float64)
    there = chord_entropy.World(torch.zeros_like(expert), expert, torch.zeros_like(expert))
    logits = there.start
    for _ in range(800):
        logits = logits - 5.0 * chord_entropy.gradient(logits, there, weight, 1.0)
    expected = chord_entropy.destination(expert, weight)
    torch.testing.assert_close(expected.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(logits.softmax(-1), expected, atol=0.01, rtol=0)


def test_the_water_level_of_phi_by_hand():
    expert = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    # 0.6 and 0.3 stay: 2 - lambda (1/0.6 + 1/0.3) = 1, lambda = 0.2; in the second row all: lambda = 2 / (20 + 20 + 1/0.9)
    level = 2 / (40 + 1 / 0.9)
    expected = [[2 / 3, 1 / 3, 0], [1 - 20 * level, 1 - 20 * level, 1 - level / 0.9], [1 / 3, 1 / 3, 1 / 3]]
    torch.testing.assert_close(chord_entropy.destination(expert, "phi"), torch.tensor(expected, dtype=torch.float64))


def test_data_that_the_model_would_have_said_do_not_move_sft_but_sharpen_dft():
    """E over the policy of SFT's gradient is 0; of DFT's it is that of -sum p^2 / 2."""
    there = chord_entropy.world(3, chord_entropy.TINY, off=0.0)
    still, sharper = (chord_entropy.gradient(there.start, there, weight, 1.0) for weight in ("none", "is"))
    assert still.abs().max() < 1e-12
    leaf = there.start.clone().requires_grad_()
    (-leaf.softmax(-1).square().sum() / 2).backward()
    torch.testing.assert_close(sharper, leaf.grad)


def test_entropy_rises_without_is_collapses_with_it_and_phi_is_between():
    """CHORD's figure on a small table, exact and without a random step: a statement about the losses, not about luck."""
    settings = replace(chord_entropy.SETTINGS, contexts=6, vocabulary=20, steps=150)
    changes = {arm: [chord_entropy.run(arm, seed, settings, None)["end"] for seed in (0, 1)] for arm in chord_entropy.WEIGHTS}
    none, important, phi = ([end["end"] - end["start"] for end in changes[arm]] for arm in chord_entropy.WEIGHTS)
    assert min(none) > 0.3 and max(important) < -0.1 and all(abs(c) < min(abs(a), abs(b)) for a, b, c in zip(none, important, phi, strict=True))


# -- the task and the model -----------------------------------------------------------------------------------------------------------------------


def test_answers_are_judged_by_their_end():
    problems = columns.draw_problems(40, "+-", random.Random(1))
    rng = random.Random(2)
    for style in (columns.BASE, columns.expert_style(0.5)):
        rows = [problem.solved(style, rng) for problem in problems]
        padded = torch.tensor([row + [columns.PAD] * (columns.LONGEST - len(row)) for row in rows])
        assert columns.is_right(padded, problems).all()
        no_end = padded.masked_fill(padded == columns.END, columns.PAD)
        wrong = padded.clone()
        last = (padded == columns.END).int().argmax(1) - 1
        wrong[torch.arange(40), last] = (wrong[torch.arange(40), last] + 1) % 10
        assert not columns.is_right(no_end, problems).any() and not columns.is_right(wrong, problems).any()
    for problem in problems:
        signs = columns.text(problem.prompt)
        value = eval(signs[:3].lstrip("0").rjust(1, "0") + signs[3] + (signs[4:7].lstrip("0") or "0"))
        assert int(columns.text(problem.result)) == value and len(problem.prompt) == columns.PROMPT


def test_held_out_problems_are_in_no_training_set():
    held = {problem.prompt for problem in columns.draw_problems(300, "+-", random.Random(1), held_out=True)}
    trained = {problem.prompt for seed in range(3) for problem in columns.draw_problems(3000, "+-", random.Random(seed))}
    assert len(held) == 300 and not held & trained


def test_the_cache_gives_what_a_whole_forward_gives():
    torch.manual_seed(0)
    model, prompts = TinyLlama(TINY_SIZE), torch.randint(0, 20, (3, 7))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    seen = []

    def choose(logits, done):
        seen.append(logits[0])
        return logits[0].argmax(-1).where(~done, -1)

    drawn = draw(model, [prompts], 6, choose, end=columns.END, pad=columns.PAD)
    logits = model(torch.cat([prompts, drawn.tokens], 1))[:, 6:-1]
    torch.testing.assert_close(torch.stack(seen, 1), logits, atol=1e-5, rtol=1e-5)


def test_two_streams_get_the_same_tokens_and_rows_stop_at_their_end():
    torch.manual_seed(1)
    model = TinyLlama(TINY_SIZE)
    script = iter([[3, 4], [columns.END, 5], [9, columns.END], [9, 9]])
    drawn = draw(model, [torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)], 8,
                 lambda logits, done: torch.tensor(next(script)), end=columns.END, pad=columns.PAD)  # fmt: skip
    assert drawn.tokens.tolist() == [[3, columns.END, columns.PAD], [4, 5, columns.END]]


# -- a step ---------------------------------------------------------------------------------------------------------------------------------------


def demos(count, seed=0):
    rng = random.Random(seed)
    return [(problem, problem.solved(columns.expert_style(0.5), rng)) for problem in columns.draw_problems(count, "+", rng)]


def test_each_part_has_its_share_whatever_its_length():
    rng = random.Random(0)
    own = Part(torch.tensor([[*p.prompt, 1, 2, columns.END] for p in columns.draw_problems(3, "+", rng)]), 0.7, expert=False, advantage=torch.tensor([1.0, -1.0, 2.0]))
    ids, labels, inputs = joined([own, demonstrations(demos(4), share=0.3)])
    live = labels != -100
    assert inputs.coefficient[:3].sum() == pytest.approx(0.7) and inputs.coefficient[3:].sum() == pytest.approx(0.3)
    assert torch.equal(inputs.coefficient != 0, live) and torch.equal(labels[live], ids[:, 1:][live])
    assert live[:3].sum() == 9 and inputs.expert.any(1).tolist() == [False] * 3 + [True] * 4 and inputs.advantage[2].unique().tolist() == [2.0]


def test_clean_demonstrations_of_the_same_questions_help_srft():
    """Demonstrations that did not belong to their questions would teach nothing: the trap of a first version elsewhere."""
    torch.manual_seed(0)
    model = TinyLlama(TINY_SIZE)
    trainer, loss = Trainer(model, 3e-3), bind("srft")
    clean = [(problem, problem.solved(columns.Style(short=1.0), random.Random(0))) for problem, _ in demos(4)]
    part = demonstrations(clean, share=1.0, advantage=torch.ones(4))
    first = trainer.step([part], loss).metric_sums["nll"]
    for _ in range(120):
        last = trainer.step([part], loss).metric_sums["nll"]
    assert last < first / 10


def test_batches_use_every_demonstration_once_a_pass():
    batches = passes(demos(5), 2, random.Random(0))
    seen = [demo[0].prompt for _ in range(5) for demo in next(batches)]
    assert all(seen.count(prompt) == 2 for prompt in seen)


def test_rollouts_are_judged_in_groups():
    torch.manual_seed(0)
    model, problems = TinyLlama(TINY_SIZE), columns.draw_problems(2, "+", random.Random(0))
    drawn = rollouts(model, problems, torch.Generator().manual_seed(0))
    assert drawn.reward.shape == (2, 8) and drawn.ids[8:, : columns.PROMPT].eq(torch.tensor(problems[1].prompt)).all()
    assert evaluate(model, problems, seed=3) == evaluate(model, problems, seed=3)


def test_the_variant_is_srft_unless_told_otherwise():
    """Tokens: two demonstrations, a right answer, a wrong one."""
    logp = torch.tensor([-0.5, -2.0, -1.0, -0.7], dtype=torch.float64, requires_grad=True)
    stats = TokenStats(logp, torch.tensor([0.3, 0.9, 1.1, 0.2], dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    inputs = TokenInputs(
        coefficient=torch.ones(4), expert=torch.tensor([True, True, False, False]), advantage=torch.tensor([0.5, 0.5, 1.0, -1.0]),
        extra={"reward": torch.tensor([0.0, 0.0, 1.0, 0.0])},
    )  # fmt: skip

    def slopes(**params):
        terms = srft_stages.srft_variant(stats, inputs, **params)
        return torch.autograd.grad(terms.loss.sum(), logp)[0], terms.weight

    paper = torch.autograd.grad(srft(stats, inputs).loss.sum(), logp)[0]
    torch.testing.assert_close(slopes()[0], paper)
    demo, rest = slice(0, 2), slice(2, 4)
    plus, weight = slopes(sft_weight="plus")
    torch.testing.assert_close((paper - plus)[demo], 0.5 * (stats.entropy[demo].exp() - (-stats.entropy[demo]).exp()))
    torch.testing.assert_close(plus[rest], paper[rest])
    assert slopes(sft_weight="plus", sft_mean=0.4)[1][demo].mean() == pytest.approx(0.4)
    assert slopes(sft_weight="minus", sft_mean=0.4)[1][0] > 0.4 > slopes(sft_weight="plus", sft_mean=0.4)[1][0]
    one, _ = slopes(rl_weight="one")
    torch.testing.assert_close(one - paper, torch.tensor([0, 0, 0.1 * math.exp(1.1) - 1, 0], dtype=torch.float64))
    assert not bind(srft_stages.srft_variant, sft_mean=0.4).token_local and bind(srft_stages.srft_variant).token_local


# -- the studies ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tried", STUDIES, ids=lambda tried: tried.name)
def test_a_study_from_the_command_line_to_its_page(tried, tmp_path, capsys):
    words = ["--tiny", "--seeds", "0", "1", "2", "--runs", str(tmp_path / "runs"), "--into", str(tmp_path)]
    result = study.main(tried, words)
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(document["table"]) == set(tried.arms) and document["header"]["tiny"] and next(tmp_path.glob("*.png")).stat().st_size > 5000
    assert document["claims"] == result["claims"] and set(document["curves"]) == set(document["made"]) == set(tried.arms) and all(len(claim["values"]) == 3 for claim in document["claims"])
    made = page.section(document)
    assert all(claim["statement"] in made for claim in document["claims"]) and "TINY SETTINGS" in made
    assert capsys.readouterr().out.count(" seed ") >= 3 * len(tried.arms)
    study.main(tried, words)
    assert " seed " not in capsys.readouterr().out, "a finished arm is not run again"


def test_verdicts():
    assert study.verdict([0.1, 0.11, 0.12]) == "shows" and study.verdict([-0.1, -0.11, -0.12]) == "opposite"
    assert study.verdict([0.1, -0.1, 0.05]) == "does not show" and study.verdict([0.0, 0.0, 0.0]) == "does not show"
    assert study.verdict([0.1, 0.1]) == "too few seeds" and study.verdict([0.1, math.nan, 0.1]) == "not measured"
    values = [0.1, 0.2, 0.3]  # mean 0.2, standard error 0.1 / sqrt(3) = 0.0577: 3.46 of them
    assert study.mean_and_error(values) == pytest.approx((0.2, 0.0577350269)) and study.verdict(values) == "shows"
    assert study.verdict([0.05, 0.2, 0.35]) == "does not show", "2.3 standard errors"


def test_other_settings_or_other_code_are_run_again(tmp_path, monkeypatch):
    made = []

    def run(arm, seed, settings, runs):
        made.append((arm, seed))
        return {"end": {}, "curve": {}}

    tried = replace(chord_entropy.STUDY, run=run, name="tried")
    for settings in (chord_entropy.TINY, chord_entropy.TINY, replace(chord_entropy.TINY, steps=5)):
        study.run_arm(tried, "none", 0, settings, tmp_path)
    assert len(made) == 2
    monkeypatch.setattr(study, "code_of_run", lambda run: "another")
    kept = study.run_arm(tried, "none", 0, settings, tmp_path, as_kept=True)
    assert len(made) == 2 and kept["made"].keys() == {"code", "commit", "dirty", "date"} and kept["made"]["code"] != "another"
    study.run_arm(tried, "none", 0, settings, tmp_path)
    assert len(made) == 3
