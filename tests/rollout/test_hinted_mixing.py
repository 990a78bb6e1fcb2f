"""Hinted decoding without an engine: the mix against fp64 and by hand, the stops, and the text that comes token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_plugin.data import train_tokenizer
from megatron_plugin.rollout.hinted import mixing
from megatron_plugin.rollout.hinted.lockstep import exact_mix
from megatron_plugin.rollout.hinted.mixing import Phase, keep_nucleus, mix, share_of_plain
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.stops import REPLACEMENT, IncrementalText, Repetition, SplitterFinder, repeats
from tests.rollout.hinted_bench import TEXTS

P, Q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
EPS = 1e-5  # nats; measured 2e-6, fp32 against fp64, 1000 columns


def options(**fields):
    return HintedOptions(**dict(vocab_size=3, end_ids=(2,), top_p=1.0, temperature=1.0) | fields)


# -- the mix ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta, share, mixed", [
    (0.7, 0.510893, (0.437996, 0.291962, 0.270042)), (0.0, 0.0, (0.7, 0.2, 0.1)), (3.0, 1.0, (0.2, 0.3, 0.5)),
])  # fmt: skip
def test_values_by_hand(beta, share, mixed):
    """reference values worked out by hand: H(p) / log 3 = 0.729847."""
    assert share_of_plain(P, options(beta=beta)).item() == pytest.approx(share, abs=2e-6)
    assert mix(P, Q, [Phase.MIXED], options(beta=beta)).exp().squeeze().tolist() == pytest.approx(mixed, abs=2e-6)


@pytest.mark.parametrize("fields, share", [
    (dict(schedule="sigmoid", beta=4.0), 1 / (1 + math.exp(-4 * 0.229847))), (dict(schedule="sigmoid", beta=4.0, center=0.7), 1 / (1 + math.exp(-4 * 0.029847))),
    (dict(schedule="piecewise"), 1.0), (dict(schedule="piecewise", bounds=(0.5, 0.9)), 0.229847 / 0.4), (dict(schedule="piecewise", bounds=(0.75, 0.9)), 0.0),
])  # fmt: skip
def test_schedules_by_hand(fields, share):
    assert share_of_plain(P, options(**fields)).item() == pytest.approx(share, abs=3e-6)


@pytest.mark.parametrize("width, vocab", [(2, 2), (257, 257), (1000, 977)])  # the last one is padded
@pytest.mark.parametrize("fields", [dict(), dict(beta=3.0), dict(schedule="sigmoid", beta=5.0), dict(schedule="piecewise", bounds=(0.2, 0.9)), dict(top_p=0.5)])
@pytest.mark.parametrize("phase", list(Phase))
def test_mix_is_the_slow_ways(width, vocab, fields, phase):
    draw = torch.Generator().manual_seed(width)
    hinted, plain = (3 * torch.randn(5, width, generator=draw) + 40 for _ in range(2))
    chosen = options(vocab_size=vocab, end_ids=(0,), **fields)
    got = mix(hinted, plain, [phase] * 5, chosen)
    assert got.dtype is torch.float32 and got.shape == hinted.shape and (got[:, vocab:] == -math.inf).all()
    for row in range(5):
        truth = exact_mix(hinted[row], plain[row], chosen, first=phase is Phase.FIRST, plain_only=phase is Phase.PLAIN)
        mine = got[row, :vocab].double().softmax(-1)
        assert ((truth > 0) == (mine > 0)).all() and (mine - truth).abs().max() < EPS
        inside = truth > 0
        assert (mine[inside].log() - truth[inside].log()).abs().max() < EPS


def test_rows_do_not_touch_each_other():
    draw = torch.Generator().manual_seed(0)
    hinted, plain = (torch.randn(3, 50, generator=draw) for _ in range(2))
    chosen = options(vocab_size=50)
    together = mix(hinted, plain, list(Phase), chosen)
    for row, phase in enumerate(Phase):
        assert torch.equal(together[row : row + 1], mix(hinted[row : row + 1], plain[row : row + 1], [phase], chosen))


def test_impossible_tokens():
    """-inf logits: a stream without a say does not veto, one with a say does; nothing is nan."""
    hinted, plain = torch.tensor([[0.0, -math.inf, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -math.inf, 0.0]])
    chosen = options(vocab_size=4)
    first, mixed, alone = (mix(hinted, plain, [phase], chosen)[0] for phase in Phase)
    assert torch.isfinite(first).tolist() == [True, False, True, True] and torch.isfinite(alone).tolist() == [True, True, False, True]
    assert torch.isfinite(mixed).tolist() == [True, False, False, True]


def test_the_first_token_may_be_mixed():
    chosen = options(first_from_hint=False, beta=3.0)
    assert torch.allclose(mix(P, Q, [Phase.FIRST], chosen), Q)


def test_nucleus():
    """The token that reaches top_p is in, and its equals; the best one always."""
    logm = torch.tensor([[0.5, 0.3, 0.11, 0.09]]).log()
    kept = {p: torch.isfinite(keep_nucleus(logm, p))[0].tolist() for p in (0.01, 0.5 + 1e-3, 0.79, 0.81, 0.95, 1.0)}
    assert kept == {0.01: [1, 0, 0, 0], 0.501: [1, 1, 0, 0], 0.79: [1, 1, 0, 0], 0.81: [1, 1, 1, 0], 0.95: [1, 1, 1, 1], 1.0: [1, 1, 1, 1]}


def test_wide_and_narrow_nuclei_in_one_batch(monkeypatch):
    """A row whose nucleus is larger than the head that is looked at first gets it all the same, and changes no other row."""
    draw = torch.Generator().manual_seed(0)
    logm = (torch.randn(6, 200, generator=draw) * torch.tensor([0.1, 9, 0.1, 9, 0, 1])[:, None]).log_softmax(-1)
    whole = keep_nucleus(logm, 0.9)
    monkeypatch.setattr(mixing, "HEAD", 20)
    cut = keep_nucleus(logm, 0.9)
    counts = torch.isfinite(cut).sum(-1).tolist()
    assert torch.equal(whole, cut) and min(counts) < 20 < max(counts) and counts[4] == 200
    assert torch.equal(torch.cat([keep_nucleus(row[None], 0.9) for row in logm]), cut)
    kept = cut.exp().sum(-1)
    assert (kept >= 0.9 - 1e-6).all() and (kept[[1, 3]] - torch.where(torch.isfinite(cut), cut, 9).min(-1).values.exp()[[1, 3]] < 0.9).all()


def test_the_nucleus_is_cut_before_the_temperature():
    """(0.5, 0.3, 0.2) at 0.75 keeps two tokens; cut after a temperature of 2 (0.41, 0.32, 0.26) it would keep three."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    chosen = options(top_p=0.75, temperature=2.0)
    truth = exact_mix(logits[0], logits[0], chosen, first=False, plain_only=False)
    mine = (mix(logits, logits, [Phase.MIXED], chosen) / 2.0).softmax(-1)[0].double()
    assert truth[2] == 0 and torch.allclose(mine, truth, atol=1e-6) and mine[0] == pytest.approx(0.5**0.5 / (0.5**0.5 + 0.3**0.5), abs=1e-6)


@pytest.mark.parametrize("hinted, plain, vocab", [((1, 5), (1, 6), 5), ((1, 5), (1, 5), 6)])
def test_shapes_that_do_not_fit(hinted, plain, vocab):
    with pytest.raises(ValueError, match="expected two alike of at least"):
        mix(torch.zeros(hinted), torch.zeros(plain), [Phase.MIXED], options(vocab_size=vocab))


# -- options ------------------------------------------------------------------------------------------------------------------------------------------

BAD = {
    "vocab_size": 1, "end_ids": (3,), "beta": -0.1, "schedule": "cosine", "bounds": (0.7, 0.3), "top_p": 0.0, "temperature": 0.005, "max_tokens": 0,
    "repeat_ngram": 0, "repeat_count": 1, "repeat_every": -1, "seed": 1.5, "splitter": None, "center": math.nan,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    with pytest.raises(ValueError, match=f"^{name}: got .*, expected"):
        options(**{name: BAD[name]})


def test_a_tokenizer_without_an_end_is_explained():
    with pytest.raises(ValueError, match="end_ids: got none.*a tokenizer without an end token needs one named"):
        options(end_ids=())


# -- text and stops -----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t", vocab_size=300)


def decode_with(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab é漢😀{\\boxed}", max_size=40))
def test_text_comes_whole(tokenizer, text):
    """Piece by piece it is the whole text; no piece ever holds half a character."""
    incremental = IncrementalText(decode_with(tokenizer))
    pieces = [incremental.add(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text and not any(REPLACEMENT in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="a é漢", max_size=30), splitter=st.sampled_from(["é", "a é", "漢", "éé", "a"]))
def test_the_splitter_is_found_with_its_last_token(tokenizer, text, splitter):
    """Neither before, within a character, nor later."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    finder = SplitterFinder(splitter, decode_with(tokenizer))
    for count, token in enumerate(tokens, 1):
        assert finder.add(token) == (splitter in decode_with(tokenizer)(tokens[:count]))
    assert finder.found == (splitter in text)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 299), max_size=60))
def test_any_tokens_are_survived(tokenizer, tokens):
    """Bytes that are no text: an answer of a bad model.  An ASCII splitter is found all the same."""
    finder = SplitterFinder("\\boxed{", decode_with(tokenizer))
    for token in [*tokens, *tokenizer.encode("so \\boxed{3}", add_special_tokens=False)]:
        finder.add(token)
    assert finder.found


def test_no_splitter_is_never_found(tokenizer):
    assert not SplitterFinder("", decode_with(tokenizer)).add(20)


@pytest.mark.parametrize("tokens, ngram, count, expected", [
    ([1, 2] * 5, 2, 5, True), ([1, 2] * 5, 2, 6, False), ([1, 2, 3] * 4 + [1, 2], 2, 5, True),  # the last run counts
    ([7] * 34, 30, 5, True), ([7] * 33, 30, 5, False), ([], 30, 5, False), (list(range(200)), 1, 2, False),
])  # fmt: skip
def test_repeats(tokens, ngram, count, expected):
    assert repeats(tokens, ngram, count) is expected


def test_repetition_is_looked_for_now_and_then():
    stop = Repetition(2, 2, 10)
    assert [n for n in range(31) if stop.due([1] * n)] == [10, 20, 30]
    assert not Repetition(2, 2, 0).due([1] * 100) and not stop.due(list(range(10)))
