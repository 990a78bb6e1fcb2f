"""Hinted decoding in a real vLLM: what it draws, and from which distribution, is what Hugging Face's forward of both streams says.

One server for the file.  Its key-value cache is so small that long answers push each other out: a pair that falls out of step must never be kept."""

import json
import threading
import time
from collections import Counter

import pytest
import torch

from megatron_plugin.data import parse_line
from megatron_plugin.rollout.engine import EngineError, Health
from megatron_plugin.rollout.hinted.decode import HintedDecoder, HintedPrompt
from megatron_plugin.rollout.hinted.engine import HalfRequest, start_pair_engine
from megatron_plugin.rollout.hinted.lockstep import decode_in_lockstep
from megatron_plugin.rollout.hinted.realign import Realigner, RealignOptions, realign
from megatron_plugin.rollout.hinted.stops import REPLACEMENT, EndReason
from megatron_plugin.rollout.rewards import RewardResult
from megatron_plugin.rollout.transfer import send_weights
from megatron_plugin.rollout.transports.shm import SharedMemory
from megatron_plugin.rollout.vllm_process import EngineOptions, _members
from tests.rollout.hinted_bench import LOGP, HintedBench
from tests.rollout.vllm_models import weights_of

LIMIT_S = 120
BLOCK_BYTES = 2 * 2 * 2 * 32 * 128 * 4  # of the key-value cache: keys and values, 2 layers, 2 heads of 32, 128 tokens, fp32
BLOCKS = 70  # 32 pairs hold 64 while each of their streams is below 128 tokens, and need 128 above


class Bench(HintedBench):
    def __init__(self, folder):
        super().__init__(folder)
        options = EngineOptions(
            model_dir=str(folder), dtype="float32", max_model_len=512, max_num_seqs=64, kv_cache_bytes=BLOCKS * BLOCK_BYTES,
            log=str(folder / "engine.log"), extra_args=("--max-logprobs", "320"),
        )  # fmt: skip
        self.engine = start_pair_engine(options, folder / "tokenizer")
        send_weights([self.engine], weights_of(self.model), version=1, transport=SharedMemory())

    def draw(self, prompts, options, **arguments):
        return HintedDecoder(self.engine, options, self.tokenizer, timeout_s=LIMIT_S, **arguments).run(prompts)

    def half(self, stream, pair, options, *, seed=1, prompt=None, max_tokens=8):
        prompt = prompt or self.prompts(1)[0]
        ids = prompt.plain_ids if stream == "plain" else prompt.hinted_ids
        return HalfRequest(pair=pair, stream=stream, token_ids=ids, seed=seed, max_tokens=max_tokens, order=1)


@pytest.fixture(scope="module")
def bench(vllm, tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("model"))
    yield bench
    group = bench.engine.process.popen.pid
    bench.engine.close()
    assert not _members(group), "close left a process"


class WideWire:
    """Asks for the log-probabilities of the whole vocabulary, and keeps what the server answers."""

    def __init__(self, wire):
        self.wire, self.rows = wire, []

    def __getattr__(self, name):
        return getattr(self.wire, name)

    def request(self, verb, path, *arguments, **keywords):
        if not path.endswith("/generate"):
            return self.wire.request(verb, path, *arguments, **keywords)
        keywords["json"]["sampling_params"]["logprobs"] = 320
        answer = self.wire.request(verb, path, *arguments, **keywords)
        content = answer.json()["choices"][0]["logprobs"]["content"]
        self.rows.append([{entry["token_id"]: entry["logprob"] for entry in step["top_logprobs"]} for step in content])
        return answer


SCHEDULES = {
    "linear": dict(schedule="linear", beta=1.0),
    "linear, saturated": dict(schedule="linear", beta=3.0),
    "sigmoid": dict(schedule="sigmoid", beta=4.0),
    "piecewise, nucleus": dict(schedule="piecewise", bounds=(0.4, 0.9), top_p=0.9),
    "linear, nucleus, temperature": dict(beta=0.7, top_p=0.8, temperature=0.5),
    "mixed from the first token on": dict(first_from_hint=False),
    "hint alone": dict(beta=0.0),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_each_step_draws_from_hugging_faces_mix(bench, monkeypatch, case):
    """All columns of every step, both streams."""
    options = bench.options(**SCHEDULES[case])
    (prompt,) = bench.prompts(1)
    wire = WideWire(bench.engine._wire)
    monkeypatch.setattr(bench.engine, "_wire", wire)
    sample = bench.draw([prompt], options).samples[prompt.key]
    truth = bench.truth(prompt, sample.token_ids, options)
    assert len(wire.rows) == 2 and len(wire.rows[0]) == len(sample.token_ids) == len(truth)
    for row in wire.rows:
        for step, expected_V in zip(row, truth, strict=True):
            got_V = torch.tensor([step.get(v, -9999.0) for v in range(320)], dtype=torch.float64)
            inside = expected_V > -torch.inf
            assert inside.sum() > 1 and (got_V[: bench.vocab_size][inside] - expected_V[inside]).abs().max() < LOGP
            assert (got_V[: bench.vocab_size][~inside] < -1000).all() and (got_V[bench.vocab_size :] < -1000).all(), "outside the nucleus, and padding"


def test_greedy_draws_hugging_faces_tokens(bench):
    options = bench.options(temperature=0.0, max_tokens=40, top_p=0.95)
    prompts = bench.prompts(16)
    run = bench.draw(prompts, options)
    for prompt in prompts:
        expected = decode_in_lockstep(bench.model, prompt.plain_ids, prompt.hinted_ids, options)
        sample = run.samples[prompt.key]
        assert list(sample.token_ids) == expected.token_ids and sample.end_reason.value == expected.end_reason
        assert bench.error(prompt, sample, options) < LOGP
    assert len({sample.token_ids for sample in run.samples.values()}) == 16 and not run.counts["retried"]


def test_a_seed_repeats_an_answer_in_any_company(bench):
    options = bench.options(seed=5)
    prompts = bench.prompts(12)
    together = bench.draw(prompts, options).samples
    alone = bench.draw(prompts[7:8], options).samples
    assert alone["p7"].token_ids == together["p7"].token_ids
    other = bench.draw(prompts, bench.options(seed=6)).samples
    assert all(other[key].token_ids != together[key].token_ids for key in together)
    same = HintedPrompt("another key", prompts[7].plain_ids, prompts[7].hinted_ids)
    assert bench.draw([same], options).samples["another key"].token_ids != together["p7"].token_ids


def test_after_the_splitter_the_plain_stream_alone_speaks(bench):
    """The splitter is what the answer happens to say after some tokens: letters of several tokens, or one that is not ASCII."""
    fields = dict(temperature=0.0, max_tokens=40, end_ids=(299,))
    prompts = bench.prompts(14)
    before = bench.draw(prompts, bench.options(**fields)).samples
    splitters = {key: piece for key, sample in before.items() if (piece := _sayable(sample.text))}
    assert any(not text.isascii() for text in splitters.values())
    seen = Counter()
    for prompt in [prompt for prompt in prompts if prompt.key in splitters]:
        options = bench.options(**fields, splitter=splitters[prompt.key])
        expected = decode_in_lockstep(bench.model, prompt.plain_ids, prompt.hinted_ids, options, bench.tokenizer)
        sample = bench.draw([prompt], options).samples[prompt.key]
        assert list(sample.token_ids) == expected.token_ids and sample.split_at == expected.split_at
        assert bench.error(prompt, sample, options) < LOGP
        seen["split"] += sample.split_at is not None
        seen["changed"] += sample.token_ids != before[prompt.key].token_ids
    assert seen["split"] >= 8 and seen["changed"] >= 5, "this test could not fail"


def _sayable(text):
    """Two characters of its first half, without bytes that are no text; "": there are none."""
    pieces = [text[i : i + 2] for i in range(4, len(text) // 2) if REPLACEMENT not in text[i : i + 2]]
    return next((piece for piece in pieces if not piece.isascii()), pieces[0] if pieces else "")


def test_the_first_token_is_the_hinted_streams(bench):
    prompts = bench.prompts(8)
    hinted = bench.draw(prompts, bench.options(temperature=0.0, max_tokens=1)).samples
    with torch.no_grad():
        best = {p.key: int(bench.model(torch.tensor([p.hinted_ids])).logits[0, -1, : bench.vocab_size].argmax()) for p in prompts}
    assert {key: sample.token_ids[0] for key, sample in hinted.items()} == best
    mixed = bench.draw(prompts, bench.options(temperature=0.0, max_tokens=1, first_from_hint=False, beta=3.0)).samples
    assert any(mixed[key].token_ids != hinted[key].token_ids for key in hinted)


def test_the_plain_streams_end_ends_both(bench):
    """The ends asked for, on the first token too, and no other: the model's own end is one more token like any."""
    ends = tuple(range(3, bench.vocab_size, 3))
    prompts = bench.prompts(16)
    run = bench.draw(prompts, bench.options(end_ids=ends, max_tokens=60))
    for sample in run.samples.values():
        assert sample.end_reason is EndReason.EOS and sample.token_ids[-1] in ends and not set(sample.token_ids[:-1]) & set(ends)
    assert min(len(s.token_ids) for s in run.samples.values()) == 1 and run.tokens < 16 * 30
    own = bench.draw(prompts, bench.options(end_ids=(299,), max_tokens=120, top_p=1.0)).samples.values()
    assert any(bench.end in sample.token_ids[:-1] for sample in own), "the model's own end was never drawn: this test could not fail"


def test_repetition_ends_both(bench):
    options = bench.options(temperature=0.0, max_tokens=100, repeat_ngram=2, repeat_count=2, repeat_every=10, first_from_hint=False)
    prompts, reasons = bench.prompts(8), Counter()
    run = bench.draw(prompts, options)
    for prompt in prompts:
        expected = decode_in_lockstep(bench.model, prompt.plain_ids, prompt.hinted_ids, options)
        sample = run.samples[prompt.key]
        assert (list(sample.token_ids), sample.end_reason.value) == (expected.token_ids, expected.end_reason)
        assert len(sample.logp) == len(sample.token_ids)
        reasons[expected.end_reason] += 1
    assert reasons["repeating"] >= 2


def test_pairs_that_are_pushed_out_are_drawn_again_and_none_is_kept_torn(bench):
    """200 pairs in a cache that has room for 17 long ones.  The truth is Hugging Face's: a token of a torn pair would be off by nats."""
    options = bench.options(max_tokens=150, top_p=1.0, end_ids=(299,))
    prompts = bench.prompts(200, "long")
    run = bench.draw(prompts, options)
    print(run)
    assert run.counts["desynchronised"] > 3 and run.counts["unpaired steps"] > 3, "nothing was pushed out: this test could not fail"
    assert len(run.samples) == 200 and not run.rejected and run.counts["undetected by the engine"] == 0
    worst = max(bench.error(prompt, run.samples[prompt.key], options) for prompt in prompts)
    assert worst < LOGP
    torn = next(p for p in prompts if run.samples[p.key].attempts > 1)
    assert bench.draw([torn], options).samples[torn.key].token_ids == run.samples[torn.key].token_ids, "drawn again is drawn as if alone"


def test_pairs_that_join_others_tear_nothing(bench):
    """Answers of many lengths, so that pairs are handed in while others run; the cache has room for all."""
    options = bench.options(end_ids=tuple(range(3, bench.vocab_size, 40)), max_tokens=60)
    prompts = bench.prompts(150, "join")
    run = bench.draw(prompts, options)
    assert len(run.samples) == 150 and not run.torn and len({len(s.token_ids) for s in run.samples.values()}) > 20
    assert max(bench.error(prompt, run.samples[prompt.key], options) for prompt in prompts[::5]) < LOGP


def test_a_stream_alone_is_ended_and_reported(bench):
    options = bench.options()
    answer = bench.engine.draw_half(bench.half("plain", "lonely", options), options, timeout_s=LIMIT_S)
    assert answer.token_ids == (bench.end,)
    (report,) = bench.engine.pair_reports(["lonely", "unheard of"]).values()
    assert report.unpaired == 1 and report.drawn == 0 and "the plain stream was in the batch alone" in report.broken
    assert not bench.engine.pair_reports(["lonely"]), "reports are given once"


def test_streams_that_draw_different_tokens_are_reported(bench):
    """Two seeds, so that the halves of one distribution part."""
    options, answers, before = bench.options(top_p=1.0), {}, bench.engine.taken()
    bench.engine.pause()

    def ask(stream, seed):
        answers[stream] = bench.engine.draw_half(bench.half(stream, "parting", options, seed=seed, max_tokens=20), options, timeout_s=LIMIT_S)

    threads = [threading.Thread(target=ask, args=item) for item in (("plain", 1), ("hinted", 2))]
    for thread in threads:
        thread.start()
    while bench.engine.taken() < before + 2:
        time.sleep(0.01)
    bench.engine.resume()
    for thread in threads:
        thread.join()
    report = bench.engine.pair_reports(["parting"])["parting"]
    assert "in the hinted stream" in report.broken and report.drawn < 20
    assert all(len(answer.token_ids) == report.drawn + 1 for answer in answers.values()), "both are ended at once"


def test_realignment_through_the_real_engine(bench):
    """Analyses and pairs of one server; the reward believes everything."""

    class Believes:
        name, counts = "believes", Counter()

        def __call__(self, samples):
            return [RewardResult(1.0, "right") for _ in samples]

        def close(self):
            """Nothing to close."""

    lines = [parse_line(json.dumps({"question": f"{i} + 1", "answer": f"#### {i + 1}"}), f"x.jsonl:{i}") for i in range(12)]
    ends = tuple(range(3, bench.vocab_size, 40))
    decoder = HintedDecoder(bench.engine, bench.options(end_ids=ends, max_tokens=200), bench.tokenizer, timeout_s=LIMIT_S)
    options = RealignOptions(unaided=None, analysis_prompt="so", marker=" ", analysis_max_tokens=60)
    out = list(realign(lines, realigner := Realigner(decoder, Believes(), options)))
    print(realigner.counts)
    assert [item.source for item in out] == [f"x.jsonl:{i}" for i in range(12)] and {item.kind for item in out} <= {"hinted", "rejected"}
    hinted = [item.record for item in out if item.kind == "hinted"]
    cut = [item for item in out if "cut off (U+FFFD)" in item.reason]  # the bytes of a random model are seldom text
    assert len(hinted) + len(cut) >= 2 and all(item.end_reason == "eos" for item in cut)
    assert all(item.reason for item in out if item.kind == "rejected")
    for record in hinted:
        assert parse_line(json.dumps(record)).messages[-1].content == record["messages"][-1]["content"] and record["end_reason"] == "eos"


def test_requests_that_make_no_pair_are_refused(bench):
    options = bench.options()
    with pytest.raises(EngineError, match="expected pair, stream and options|expected a text and one of"):
        bench.engine.draw_half(bench.half("sideways", "x", options), options, timeout_s=LIMIT_S)
    assert bench.engine.health() is Health.HEALTHY
    with pytest.raises(ValueError, match="vocab_size: got 400, expected at most 320"):
        HintedDecoder(bench.engine, bench.options(vocab_size=400), bench.tokenizer)
    run = bench.draw([HintedPrompt("long", [9] * 20, [9] * 600), HintedPrompt("empty", [], [9])], options)
    assert "its hinted prompt has 600 tokens, expected 1 to 511" in run.rejected["long"] and "plain prompt has 0" in run.rejected["empty"]
    assert run.counts["unfit"] == 2 and not run.samples
