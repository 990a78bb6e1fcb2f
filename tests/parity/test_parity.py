"""The part of docs/parity.md that needs no other package: the frozen vectors, how cells are judged, and that the page is complete.

test_parity_trl.py has TRL's, which is in the environment; `make test-parity` runs the others too, with their wheels.
"""

from dataclasses import replace

import pytest
import torch

from megatron_plugin import token_stats
from tests.parity import frozen_cells
from tests.parity.case import KINDS, LENGTHS, make_case
from tests.parity.cell import Cell, judge
from tests.parity.ours import Answer
from tests.parity.run import PAGE, PEERS, rows_on_page


@pytest.mark.parametrize("cell", frozen_cells.CELLS, ids=lambda cell: cell.inputs[0])
def test_ours_is_what_the_released_code_gave(cell):
    outcome = judge(cell)
    assert outcome.ok, f"{cell.theirs} against {cell.ours}: {outcome.verdict}"


def test_every_frozen_vector_is_compared():
    assert sorted(frozen_cells.frozen()["vectors"]) == sorted(cell.inputs[0] for cell in frozen_cells.CELLS)


def test_frozen_inputs_reach_what_they_are_for():
    """gamma on both sides of its lower bound; wrong tokens just above and below srft's floor; rewards that the advantage's sign does not tell."""
    case = frozen_cells.made("idft_beta_0.3", torch.float64)
    stats = token_stats(case.logits, case.labels)
    raw = (-(stats.logp + stats.entropy) / 0.3).exp()[case.mask]
    assert raw.min() < 0.08 and ((raw > 0.1) & (raw < 2)).any() and raw.max() > 2
    for name, low, high in (("srft_paper_rare", -10, -8), ("srft_paper_floor", -14, -12)):
        case = frozen_cells.made(name, torch.float64)
        wrong = case.mask & ((~case.expert) & (case.reward == 0))[:, None]
        assert low < token_stats(case.logits, case.labels).logp[wrong].min() < high
        assert ((case.advantage > 0) != (case.reward > 0))[~case.expert].all()


def test_the_page_is_of_these_cells():
    """Written by `make test-parity`; a cell that was added or dropped since makes it stale."""
    assert rows_on_page("released code") == [(cell.theirs, cell.ours) for cell in frozen_cells.CELLS]


def test_the_page_has_no_open_row():
    text = PAGE.read_text()
    assert [name for name in PEERS if f"\n## {name}\n" not in text] == []
    verdicts = [line.rsplit(" | ", 1)[1] for line in text.splitlines() if line.startswith("| `")]
    assert len(verdicts) > 100
    assert [v for v in verdicts if not v.startswith(("agrees", "preset `", "explained: ", "within one bf16 ulp"))] == []


SAME = Cell("theirs", "ours", lambda x: Answer(x, x), lambda x: Answer(x, x), inputs=("x",), make=lambda name, dtype: torch.ones(3, dtype=dtype))
OFF = replace(SAME, mine=lambda x: Answer(x + 3e-5, x))
TURNED = replace(SAME, mine=lambda x: Answer(x, -x))
LOST = replace(SAME, mine=lambda x: Answer(x * torch.nan if x[0] == 2 else x, x), inputs=("x", "xy"),
               make=lambda name, dtype: torch.full((3,), float(len(name)), dtype=dtype))  # fmt: skip


@pytest.mark.parametrize("cell", [OFF, TURNED, LOST], ids=["value", "gradient", "NaN"])
def test_a_difference_is_seen(cell):
    assert judge(SAME).verdict == "agrees"
    outcome = judge(cell)
    assert not outcome.ok and outcome.verdict.startswith("DIFFERS")


def test_an_explanation_must_explain():
    """It fails when ours agrees anyway, and when ours with the deviation does not."""
    assert judge(replace(OFF, why="a reason", switched=SAME.mine, how="a switch")).verdict.startswith("explained: a reason (3e-05 apart)")
    stale = judge(replace(SAME, why="a reason", switched=SAME.mine))
    assert not stale.ok and "but agrees" in stale.verdict
    assert not judge(replace(OFF, why="a reason", switched=OFF.mine)).ok


@pytest.mark.parametrize("kind", KINDS)
def test_the_inputs_reach_what_they_are_for(kind):
    """Ratios beyond both clips for both signs, a group of advantage 0, one-token answers, labels the model is sure of and such as it finds absurd."""
    case = make_case(kind, torch.float64)
    logp = (case.logits / case.temperature).log_softmax(-1).gather(-1, case.labels[..., None])[..., 0]
    ratio, advantage = (logp - case.old_logp).exp()[case.mask], case.per_token(case.advantage)[case.mask]
    assert (ratio[advantage > 0] > 1.28).any() and (ratio[advantage < 0] < 0.8).any() and (advantage == 0).any()
    assert (ratio[advantage < 0] > 3).any(), "the dual clip"
    assert logp[case.mask].max() > {"plain": -0.5, "ugly": -1e-6, "hot": -1.5}[kind] and logp[case.mask].min() < -5
    assert 1 in LENGTHS[kind] and case.expert.any() and (~case.expert).any()
    assert (case.old_logp - case.rollout_logp).exp()[case.mask].max() > 2
