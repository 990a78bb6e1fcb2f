"""Pairs of rows in a batch, without an engine: both get the mix, and a pair that falls out of step is ended and reported."""

import json
import re

import pytest
import torch

from megatron_plugin.rollout.hinted.mixing import Phase, mix
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.pairs import ARGUMENT, PairMixer, check_arguments, stream_arguments


def options(**fields):
    return HintedOptions(**dict(vocab_size=3, end_ids=(2,), top_p=1.0, temperature=1.0) | fields)


def test_options_travel_as_json():
    chosen = options(beta=2.0, schedule="piecewise", bounds=(0.1, 0.2), splitter="é", end_ids=(1, 2))
    wire = json.loads(json.dumps(stream_arguments("a", "plain", chosen)))[ARGUMENT]
    check_arguments(wire)
    back = HintedOptions.from_engine(wire["options"])
    assert back.for_engine() == chosen.for_engine() and back.bounds == (0.1, 0.2)
    for spoil in (lambda w: w.pop("pair"), lambda w: w.update(stream="both"), lambda w: w["options"].update(gamma=1), lambda w: w["options"].pop("vocab_size")):
        broken = json.loads(json.dumps(wire))
        spoil(broken)
        with pytest.raises(ValueError, match="extra_args|hinted decoding"):
            check_arguments(broken)


class Rows:
    """Two requests of one pair, in the rows of a batch, drawing the best token."""

    def __init__(self, mixer=None, **fields):
        self.options = options(**dict(vocab_size=8, end_ids=(7,), splitter="", top_p=1.0) | fields)
        self.mixer = mixer or PairMixer(lambda ids: "".join("abcdefgh"[i] for i in ids))
        self.drawn = {"hinted": [], "plain": []}
        self.draw = torch.Generator().manual_seed(0)

    def seat(self, row, stream, pair="x"):
        self.mixer.seat(row, stream_arguments(pair, stream, self.options)[ARGUMENT], self.drawn[stream])

    def step(self, rows):
        """rows: row -> stream.  The tokens drawn."""
        logits = torch.randn(4, 8, generator=self.draw)
        logits[:, 7] = -9.0
        before = logits.clone()
        out = self.mixer.apply(logits)
        for row in set(range(4)) - set(rows):
            assert torch.equal(out[row], before[row]), "a row of nobody's pair was written"
        for row, stream in rows.items():
            self.drawn[stream].append(int(out[row].argmax()))
        return before, out

    def report(self, pair="x"):
        return self.mixer.take_reports([pair])[pair]


def test_both_rows_get_the_mix():
    rows = Rows()
    rows.seat(2, "plain"), rows.seat(0, "hinted")
    for step in range(3):
        before, out = rows.step({0: "hinted", 2: "plain"})
        assert torch.equal(out[0], out[2])
        assert torch.allclose(out[0], mix(before[:1], before[2:3], [Phase.MIXED if step else Phase.FIRST], rows.options)[0])
    assert rows.drawn["hinted"] == rows.drawn["plain"]
    report = rows.report()
    assert (report.drawn, report.unpaired, report.broken, report.ended, report.split_at) == (3, 0, None, None, None)
    assert rows.mixer.take_reports(["x"]) == {}


def test_rows_that_move_are_followed():
    rows = Rows()
    rows.seat(0, "hinted"), rows.seat(1, "plain")
    rows.step({0: "hinted", 1: "plain"})
    rows.mixer.move(1, 3, swap=False)
    rows.step({0: "hinted", 3: "plain"})
    rows.mixer.move(0, 3, swap=True)
    before, out = rows.step({3: "hinted", 0: "plain"})
    assert torch.allclose(out[0], mix(before[3:], before[:1], [Phase.MIXED], rows.options)[0]), "the streams changed places"
    assert rows.report().broken is None


def test_a_row_alone_breaks_its_pair_for_good():
    rows = Rows()
    rows.seat(0, "hinted"), rows.seat(1, "plain")
    rows.step({0: "hinted", 1: "plain"})
    rows.mixer.clear(1)
    _, out = rows.step({0: "hinted"})
    assert out[0].argmax() == 7 and torch.isinf(out[0]).sum() == 7, "made to end"
    rows.seat(1, "plain")
    _, out = rows.step({0: "hinted", 1: "plain"})
    assert out[0].argmax() == out[1].argmax() == 7
    report = rows.report()
    assert report.drawn == 1 and report.unpaired == 1 and report.broken == "after 1 tokens the hinted stream was in the batch alone"


@pytest.mark.parametrize("spoil, cause", [
    (lambda drawn: drawn["plain"].append(3), "after 2 tokens the hinted stream has 2, the plain one 3"),
    (lambda drawn: drawn["hinted"].pop(), "after 2 tokens the hinted stream has 1, the plain one 2"),
    (lambda drawn: drawn["plain"].__setitem__(-1, 6), "token 1 is . in the hinted stream, 6 in the plain one"),
    (lambda drawn: [d.__setitem__(-1, -1) for d in drawn.values()], "token 1 is -1 in the hinted stream"),  # vLLM's mark for "not known yet"
    (lambda drawn: [d.pop() for d in drawn.values()], "after 2 tokens the hinted stream has 1, the plain one 1"),
])  # fmt: skip
def test_streams_that_part_break_their_pair(spoil, cause):
    rows = Rows()
    rows.seat(0, "hinted"), rows.seat(1, "plain")
    for _ in range(2):
        rows.step({0: "hinted", 1: "plain"})
    spoil(rows.drawn)
    _, out = rows.step({0: "hinted", 1: "plain"})
    assert out[0].argmax() == out[1].argmax() == 7
    assert re.match(cause, rows.report().broken)


def test_the_same_stream_twice_is_no_pair():
    rows = Rows()
    rows.seat(0, "hinted"), rows.seat(1, "hinted")
    rows.step({0: "hinted", 1: "hinted"})
    assert "was in the batch twice" in rows.report().broken


def test_the_splitter_leaves_the_plain_stream_alone():
    rows = Rows(splitter="f")
    rows.seat(0, "hinted"), rows.seat(1, "plain")
    phases = []
    for _ in range(30):
        before, out = rows.step({0: "hinted", 1: "plain"})
        phases.append(torch.allclose(out[1], before[1].log_softmax(-1)))
    at = rows.drawn["plain"].index(5) + 1
    assert 1 < at < 20 and phases == [step >= at for step in range(30)] and rows.report().split_at == at


def test_repetition_ends_a_pair():
    rows = Rows(repeat_ngram=1, repeat_count=2, repeat_every=9)
    rows.seat(0, "hinted"), rows.seat(1, "plain")
    for _ in range(10):
        rows.step({0: "hinted", 1: "plain"})
    assert rows.drawn["plain"][-1] == 7
    report = rows.report()
    assert report.ended == "repeating" and report.drawn == 9 and report.broken is None


def test_a_splitter_without_a_tokenizer_is_reported():
    rows = Rows(PairMixer(None), splitter="f")
    rows.seat(0, "hinted"), rows.seat(1, "plain")
    rows.step({0: "hinted", 1: "plain"})
    assert "no tokenizer to look for the splitter" in rows.report().broken


def test_pairs_with_other_options_share_a_batch():
    one = Rows(beta=0.0)
    two = Rows(one.mixer, beta=3.0, schedule="linear")
    one.seat(0, "hinted", "one"), one.seat(1, "plain", "one"), two.seat(2, "hinted", "two"), two.seat(3, "plain", "two")
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    first = one.mixer.apply(logits.clone())
    for rows in (one, two):
        for drawn in rows.drawn.values():
            drawn.append(1)
    out = one.mixer.apply(logits.clone())
    assert torch.allclose(first[0], logits[0].log_softmax(-1)) and torch.allclose(first[2], logits[2].log_softmax(-1))
    assert torch.allclose(out[0], logits[0].log_softmax(-1)) and torch.allclose(out[2], logits[3].log_softmax(-1), atol=1e-6)

