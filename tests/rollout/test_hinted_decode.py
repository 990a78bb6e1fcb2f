"""The driver of hinted decoding over a toy engine whose batch can be made to fail: no answer that fell out of step is ever kept."""

import dataclasses
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_plugin.data import train_tokenizer
from megatron_plugin.rollout.engine import Completion, EngineError, EngineLostError
from megatron_plugin.rollout.hinted import decode as module
from megatron_plugin.rollout.hinted.decode import HintedDecoder, HintedPrompt
from megatron_plugin.rollout.hinted.engine import PairEngine, paired_options
from megatron_plugin.rollout.hinted.mixing import Phase, mix
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.pairs import PairReport
from megatron_plugin.rollout.hinted.samples import out_of_step
from megatron_plugin.rollout.hinted.stops import EndReason
from megatron_plugin.rollout.vllm_process import EngineOptions
from tests.rollout.hinted_bench import TEXTS
from tests.rollout.toy_pairs import ToyPairEngine, toy_logits
from tests.rollout.vllm_models import config_of

END = 299


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t", vocab_size=300)


@pytest.fixture
def start(tokenizer):
    """start(...): a toy engine that ends with the test."""
    engines = []

    def make(**arguments):
        engines.append(ToyPairEngine(tokenizer, **arguments))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def options(**fields):
    return HintedOptions(**dict(vocab_size=300, end_ids=(END,), max_tokens=12, temperature=1.0, splitter="", top_p=1.0) | fields)


def prompts(count):
    return [HintedPrompt(f"p{i}", [7 + i, 8, 9], [30 + i, 31, 32, 33, 7 + i, 8, 9]) for i in range(count)]


def run(engine, tokenizer, items, chosen=None, **arguments):
    return HintedDecoder(engine, chosen or options(), tokenizer, timeout_s=30, **arguments).run(items)


def test_greedy_answers_are_the_mixs_best_tokens(start, tokenizer):
    chosen = options(temperature=0.0, top_p=0.9)
    result = run(start(), tokenizer, prompts(20), chosen)
    assert len(result.samples) == 20 and result.counts["desynchronised"] == 0
    for prompt in prompts(20):
        tokens, sample = [], result.samples[prompt.key]
        while len(tokens) < 12 and END not in tokens:
            streams = (toy_logits([*ids, *tokens], 300)[None] for ids in (prompt.hinted_ids, prompt.plain_ids))
            tokens.append(int(mix(*streams, [Phase.MIXED if tokens else Phase.FIRST], chosen).argmax()))
        assert list(sample.token_ids) == tokens and len(sample.logp) == len(tokens) and sample.attempts == 1
        assert sample.end_reason is (EndReason.EOS if END in tokens else EndReason.LENGTH)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), often=st.sampled_from([0.002, 0.01, 0.05]))
def test_faults_change_no_answer(tokenizer, seed, often):
    """Rows are left out of steps at random.  What is kept is what a run without faults says; nothing is lost without a reason."""
    calm = ToyPairEngine(tokenizer)
    truth = run(calm, tokenizer, prompts(24)).samples
    calm.close()
    draw = random.Random(seed)
    engine = ToyPairEngine(tokenizer, fault=lambda step, running: [r for r in running if draw.random() < often])
    result = run(engine, tokenizer, prompts(24), attempts=2)
    engine.close()
    assert {*result.samples} | {*result.rejected} == {*truth} and not {*result.samples} & {*result.rejected}
    for key, sample in result.samples.items():
        assert (sample.token_ids, sample.logp) == (truth[key].token_ids, truth[key].logp)
    counts = result.counts
    assert counts["discarded"] == len(result.rejected) and counts["desynchronised"] == counts["retried"] + counts["discarded"]
    assert counts["undetected by the engine"] == 0 and all("out of step in each of 2 attempts" in cause for cause in result.rejected.values())


def test_both_rows_left_out_together_stay_in_step(start, tokenizer):
    """As when a whole pair is pushed out and comes back."""
    truth = run(start(), tokenizer, prompts(4)).samples
    engine = start(fault=lambda step, running: [r for r in running if 3 <= step < 6 and r.request.pair == running[0].request.pair])
    result = run(engine, tokenizer, prompts(4))
    assert result.counts["desynchronised"] == 0
    assert {k: s.token_ids for k, s in result.samples.items()} == {k: s.token_ids for k, s in truth.items()}


def test_the_last_attempt_is_alone(start, tokenizer):
    """A batch that cannot hold two pairs: what fell out is drawn one by one in the end."""
    engine = start(seqs=64, fault=lambda step, running: running[2::2])
    result = run(engine, tokenizer, prompts(10))
    assert len(result.samples) == 10 and max(s.attempts for s in result.samples.values()) == 3 and result.counts["discarded"] == 0


def test_pairs_fit_into_one_step_together(start, tokenizer):
    """No more tokens of prompts than one step takes, and no more pairs than rows."""
    engine = start(batched=45, seqs=16)
    result = run(engine, tokenizer, prompts(30), options(max_tokens=100))  # long enough to be running when others come
    assert len(result.samples) == 30 and result.counts["desynchronised"] == 0
    assert max(engine.step_tokens) <= 45 and any(tokens >= 30 for tokens in engine.step_tokens)


def test_pairs_that_run_take_their_share_of_a_step(start, tokenizer):
    """Of 45 tokens 4 pairs that run take 8, so that 3 pairs of 10 fit beside them, not 4; they do not wait for an answer."""
    engine = start(batched=45, seqs=16, gap_s=0.003)  # slow: the first are running when others come
    result = run(engine, tokenizer, prompts(12), options(max_tokens=60, end_ids=(0,)))
    assert len(result.samples) == 12 and not result.torn
    assert engine.step_tokens[0] == 40 and 8 + 30 in engine.step_tokens and max(engine.step_tokens) <= 45


def test_an_engine_that_says_nothing_is_not_believed(start, tokenizer):
    """The engine reports a pair in step although its rows drew different tokens: both answers are compared here, too."""
    engine = start(fault=lambda step, running: [running[-1]] if step == 2 else [])
    take = engine.mixer.take_reports
    engine.mixer.take_reports = lambda keys: {k: dataclasses.replace(r, broken=None, unpaired=0) for k, r in take(keys).items()}
    result = run(engine, tokenizer, prompts(4), attempts=1)
    assert result.counts["undetected by the engine"] == 1 and len(result.rejected) == 1
    engine.mixer.take_reports = lambda keys: {}
    assert "knows nothing of the pair" in run(engine, tokenizer, prompts(1), attempts=1).rejected["p0"]


HALF = Completion((1, 2, 3), (-1.0, -1.0, -1.0), "length", 1)
FINE = PairReport(3, 0, None, None, None)


@pytest.mark.parametrize("plain, report, cause", [
    ({}, {}, None), ({}, dict(broken="alone"), "alone"), ({"token_ids": (1, 5, 3)}, {}, "differ from token 1 on"), ({"token_ids": (1, 2)}, {}, "differ from token the end"),
    ({"finish_reason": "stop"}, {}, "differ"), ({"weight_version": 2}, {}, "weights 1 and 2"), ({}, dict(drawn=2), "got 3 tokens, expected 2"),
    ({}, dict(unpaired=1), "1 steps of one stream alone"), ({"logprobs": (-1.0, -1.0, -1.5)}, {}, "different distributions"),
    ({}, dict(drawn=2, ended="repeating"), None), ({}, dict(ended="repeating"), "got 3 tokens, expected 4"),
])  # fmt: skip
def test_out_of_step(plain, report, cause):
    got = out_of_step(HALF, dataclasses.replace(HALF, **plain), dataclasses.replace(FINE, **report))
    assert got is None if cause is None else cause in got


def test_seeds_and_keys_decide(start, tokenizer):
    engine = start()
    first, again, other = (run(engine, tokenizer, prompts(6), options(seed=seed)).samples for seed in (1, 1, 2))
    assert {k: s.token_ids for k, s in first.items()} == {k: s.token_ids for k, s in again.items()}
    assert all(first[k].token_ids != other[k].token_ids for k in first)
    (renamed,) = run(engine, tokenizer, [dataclasses.replace(prompts(1)[0], key="q")], options(seed=1)).samples.values()
    assert renamed.token_ids != first["p0"].token_ids


def test_the_longer_stream_decides_the_room(start, tokenizer):
    engine = start()
    long = HintedPrompt("long", [9, 8], list(range(190)))
    sample = run(engine, tokenizer, [long], options(max_tokens=50, end_ids=(0,))).samples["long"]
    assert len(sample.token_ids) == 10 and sample.end_reason is EndReason.LENGTH


UNFIT = {
    "context": (HintedPrompt("x", [1], [1] * 200), "its hinted prompt has 200 tokens, expected 1 to 199: the context holds 200"),
    "empty": (HintedPrompt("x", [], [1]), "its plain prompt has 0 tokens"),
    "stray": (HintedPrompt("x", [1, 300], [1]), r"has the token 300, expected ids in \[0, 300\)"),
    "cache": (HintedPrompt("x", [1] * 100, [1] * 150), "needs 18 blocks of key-value cache, expected at most 15"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_prompts_that_cannot_be_asked(start, tokenizer, case):
    prompt, cause = UNFIT[case]
    result = run(start(kv_blocks=15), tokenizer, [prompt, *prompts(1)])
    assert list(result.samples) == ["p0"] and result.counts["unfit"] == 1
    with pytest.raises(AssertionError, match=cause):
        raise AssertionError(result.rejected["x"])
    assert "1 hinted answers, 1 rejected" in str(result) and "unfit 1" in str(result)


def test_a_refused_half_rejects_its_pair(start, tokenizer):
    engine = start()
    draw = engine.draw_half

    def refuse(request, chosen, *, timeout_s):
        if request.stream == "plain" and request.token_ids[0] == 8:
            raise EngineError("no such thing")
        return draw(request, chosen, timeout_s=timeout_s)

    engine.draw_half = refuse
    result = run(engine, tokenizer, prompts(3))
    assert result.rejected == {"p1": "no such thing"} and len(result.samples) == 2 and result.counts["refused"] == 1


def test_a_lost_engine_ends_the_run_and_is_not_left_paused(start, tokenizer):
    engine = start()
    engine.draw_half = lambda *_, **__: (_ for _ in ()).throw(EngineLostError("gone"))
    with pytest.raises(EngineLostError, match="gone"):
        run(engine, tokenizer, prompts(2))
    assert engine.paused == 0


def test_an_engine_that_others_use_is_refused(start, tokenizer):
    engine = start()
    engine.intruders = 100
    with pytest.raises(EngineError, match="got .* requests for pairs, expected our own 4: somebody else uses it"):
        run(engine, tokenizer, prompts(2))
    assert engine.paused == 0


def test_requests_that_do_not_arrive_are_not_waited_for_forever(start, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "SETTLE_S", 0.2)
    engine = start()
    monkeypatch.setattr(engine, "taken", lambda: 0)
    with pytest.raises(EngineError, match="got 0 requests in the engine after 0.2 s, expected 4"):
        run(engine, tokenizer, prompts(2))
    assert engine.paused == 0


def test_nothing_steps_until_both_halves_are_there(start, tokenizer):
    """Halves that come one by one, and late: without the wait for them pairs would start torn."""
    engine = start()
    draw = engine.draw_half

    def late(request, chosen, *, timeout_s):
        time.sleep(0.002 * (request.order % 5) * (request.stream == "plain"))
        return draw(request, chosen, timeout_s=timeout_s)

    engine.draw_half = late
    result = run(engine, tokenizer, prompts(24))
    assert len(result.samples) == 24 and result.counts["desynchronised"] == 0 and not result.torn


def test_what_does_not_fit_together_is_refused(start, tokenizer, tmp_path):
    engine = start()
    other = train_tokenizer(["something else altogether, other merges"] * 3, tmp_path / "t", vocab_size=290)
    with pytest.raises(ValueError, match="got a tokenizer .* that is not the engine's"):
        HintedDecoder(engine, options(splitter="x"), other)
    HintedDecoder(engine, options(), other)
    with pytest.raises(ValueError, match="vocab_size: got 301, expected at most 300"):
        HintedDecoder(engine, options(vocab_size=301), tokenizer)
    with pytest.raises(ValueError, match="attempts: got 0"):
        HintedDecoder(engine, options(), tokenizer, attempts=0)
    with pytest.raises(ValueError, match="got the key 'p0' twice"):
        run(engine, tokenizer, prompts(1) * 2)


def test_cut_characters_and_missing_splitters_are_counted(start, tokenizer):
    result = run(start(), tokenizer, prompts(16), options(splitter="never said", max_tokens=6))
    assert result.counts["no splitter"] == 16
    assert result.counts["cut character"] == sum(s.text.endswith("\ufffd") for s in result.samples.values()) > 0


def test_server_options(tmp_path, tokenizer):
    config_of("qwen2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "t")
    chosen = paired_options(EngineOptions(model_dir=str(tmp_path), max_num_seqs=6, max_model_len=5000, extra_args=("--foo",)), tmp_path / "t")
    args = list(chosen.extra_args)
    assert int(args[args.index("--max-num-batched-tokens") + 1]) >= 2 * 5000 + 6 and args[-1] == "--foo"
    assert "--no-async-scheduling" in args and "--no-enable-chunked-prefill" in args and args[args.index("--scheduling-policy") + 1] == "priority"
    with pytest.raises(ValueError, match="max_num_seqs=7: expected an even number"):
        paired_options(EngineOptions(model_dir=str(tmp_path), max_num_seqs=7), tmp_path / "t")
    with pytest.raises(ValueError, match="got no tokenizer_config.json"):
        paired_options(EngineOptions(model_dir=str(tmp_path), max_num_seqs=6), tmp_path / "nowhere")


def test_limits_and_reports_of_several_workers():
    """The worst report of a pair counts; a server that was not started for pairs says so."""
    fine, torn = dataclasses.asdict(FINE), dataclasses.asdict(dataclasses.replace(FINE, broken="alone"))

    class Wire:
        def request(self, verb, path, json=None, params=None):
            paused.append(params)

            class Answer:
                def json(self):
                    return {"results": [{"a": fine, "b": torn}, {"a": torn, "b": fine, "c": fine}]}

            if json and json["method"].endswith("limits"):
                raise EngineError("no such method")
            return Answer()

    paused = []
    engine = object.__new__(PairEngine)
    engine._wire, engine.name = Wire(), "e"
    reports = engine.pair_reports(["a", "b", "c"])
    assert [reports[k].broken for k in "abc"] == ["alone", "alone", None]
    with pytest.raises(EngineError, match="it was not started for pairs: start_pair_engine"):
        engine.pair_limits()
    engine.pause()
    assert paused[-1] == {"mode": "keep", "clear_cache": False}, "else running pairs are pushed out at each pause"


def test_the_toy_is_a_model():
    assert torch.equal(toy_logits([1, 2], 5), toy_logits([1, 2], 5)) and not torch.equal(toy_logits([1, 2], 5), toy_logits([2, 1], 5))
