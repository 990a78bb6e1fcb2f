"""A real vLLM as a child process, weights through shared memory: what it samples is what Hugging Face's forward says, after every update.

One server for the file.  Tests that leave it without weights end with an update; the last test kills it."""

import os
import signal
import threading
import time

import httpx
import pytest
import torch

from megatron_plugin.rollout.engine import EngineError, EngineLostError, Health, SamplingParams, WrongModelError
from megatron_plugin.rollout.transfer import send_weights
from megatron_plugin.rollout.transports.shm import SharedMemory
from megatron_plugin.rollout.vllm_http import connect_engine, start_engine
from megatron_plugin.rollout.vllm_model import ModelDescription, describe_model
from megatron_plugin.rollout.vllm_process import EngineOptions, _members
from tests.rollout.conftest import shared_files
from tests.rollout.vllm_models import LOGP, PROMPT, VOCABULARY, change, make_model, weights_of, worst_error

LIMIT_S = 60


class Bench:
    """A trainer's side of one engine: a model, and the engine that has to keep up with it."""

    def __init__(self, folder):
        self.model = make_model(folder, "qwen2")
        self.folder = str(folder)
        self.transport = SharedMemory()
        options = EngineOptions(
            model_dir=self.folder, dtype="float32", max_model_len=512, kv_cache_bytes=64 << 20, log=str(folder / "engine.log")
        )
        self.engine = start_engine(options)

    def send(self, weights=None, **options):
        return send_weights([self.engine], weights or weights_of(self.model), version=self.engine.newest_version + 1, transport=self.transport, **options)

    def ask(self, prompt=PROMPT, **params):
        return self.engine.generate(prompt, SamplingParams(**dict(max_tokens=16, n=4, seed=1) | params), timeout_s=LIMIT_S)

    def error(self, **params):
        return worst_error(self.model, PROMPT, self.ask(**params), params.get("temperature", 1.0))


@pytest.fixture(scope="module")
def bench(vllm, tmp_path_factory):
    before = shared_files()
    bench = Bench(tmp_path_factory.mktemp("model"))
    yield bench
    group = bench.engine.process.popen.pid
    bench.engine.close()
    assert not _members(group), "close left a process"
    assert shared_files() <= before, "close left a file in shared memory"


def test_a_new_engine_is_stale_and_generates_nothing(bench):
    assert bench.engine.health() is Health.STALE and bench.engine.weight_version is None and bench.engine.newest_version == -1
    with pytest.raises(EngineError, match="STALE.*send_weights first"):
        bench.ask()


# 64 KiB cuts between the query, key and value projections of a layer, which vLLM fuses into one; 1 byte: every tensor a bucket of its own
@pytest.mark.parametrize("bucket_bytes, checksums", [(512 << 20, False), (64 << 10, True), (1, False)])
def test_logprobs_are_hugging_faces_after_every_update(bench, bucket_bytes, checksums):
    change(bench.model)
    report = bench.send(bucket_bytes=bucket_bytes, checksums=checksums)
    total = sum(t.numel() * 4 for _, t in weights_of(bench.model))
    assert report.bytes == total and report.lost == ()
    assert report.buckets == 1 if bucket_bytes > total else report.buckets > 10
    assert bench.engine.health() is Health.HEALTHY
    assert bench.error() < LOGP


def test_prompts_in_the_prefix_cache_are_forgotten(bench):
    bench.send()
    assert bench.error() < LOGP
    change(bench.model)
    assert bench.error() > 0.1, "the trainer is ahead: this test could not fail"
    bench.send()
    assert bench.error() < LOGP


def test_temperature_greedy_and_cut_support(bench):
    """Log-probabilities are those of the distribution drawn from."""
    bench.send()
    assert bench.error(temperature=0.7) < LOGP
    (greedy,) = bench.ask(temperature=0.0, n=1, seed=None)
    with torch.no_grad():
        best = bench.model(torch.tensor([[*PROMPT, *greedy.token_ids]])).logits[0, len(PROMPT) - 1 : -1].argmax(-1)
    assert greedy.token_ids == tuple(best.tolist())
    assert all(max(map(abs, c.logprobs)) < LOGP for c in bench.ask(top_k=1, n=2)), "renormalised over what top_k left"


def test_samples_of_a_group_differ_and_a_seed_repeats_them(bench):
    bench.send()
    first, again, neighbour = bench.ask(n=8), bench.ask(n=8), bench.ask(n=8, seed=2)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({c.token_ids for c in first + neighbour}) == 16, "completion i of seed 1 must not be completion i - 1 of seed 2"
    assert {c.weight_version for c in first} == {bench.engine.weight_version}
    assert all(len(c.token_ids) == len(c.logprobs) == 16 and c.finish_reason == "length" for c in first if c.finish_reason != "stop")


def test_end_tokens(bench):
    """The model's own end and the caller's; the token that ended it is in the answer."""
    bench.send()
    ends = tuple(range(0, VOCABULARY, 2))
    stopped = [c for c in bench.ask(n=16, max_tokens=32, stop_token_ids=ends) if c.finish_reason == "stop"]
    assert len(stopped) > 10
    assert all(c.token_ids[-1] in {*ends, 257} and not set(c.token_ids[:-1]) & {*ends, 257} for c in stopped)


def test_the_context(bench):
    bench.send()
    with pytest.raises(EngineError, match="prompt of 600 tokens, expected 1 to 511: the context holds 512"):
        bench.ask([1] * 600)
    with pytest.raises(EngineError, match="prompt of 0 tokens"):
        bench.ask([])
    (full,) = bench.ask([1] * 508, n=1, max_tokens=100)
    assert len(full.token_ids) <= 4 and full.finish_reason in ("length", "stop")


def test_requests_that_vllm_refuses(bench):
    bench.send()
    with pytest.raises(EngineError, match="max_num_seqs") as refusal:
        bench.ask(n=1000)
    assert not isinstance(refusal.value, EngineLostError)
    for stray in (VOCABULARY, -1):  # sent on, it would kill the engine
        with pytest.raises(EngineError, match=rf"got token {stray} in a prompt, expected ids in \[0, {VOCABULARY}\)"):
            bench.ask([1, stray, 2])
    assert bench.engine.health() is Health.HEALTHY and bench.error() < LOGP


def test_requests_under_way_end_with_the_weights_they_began_with(bench):
    bench.send()
    old, version = make_model(bench.folder, "qwen2"), bench.engine.weight_version
    old.load_state_dict(bench.model.state_dict())
    answers = []
    thread = threading.Thread(target=lambda: answers.append(bench.ask(n=8, max_tokens=200)))
    thread.start()
    time.sleep(0.3)
    change(bench.model)
    bench.send()
    thread.join(LIMIT_S)
    assert {c.weight_version for c in answers[0]} == {version}
    assert worst_error(old, PROMPT, answers[0]) < LOGP and bench.error() < LOGP


def test_versions_only_go_up(bench):
    bench.send()
    version = bench.engine.weight_version
    for bad in (version, version - 1):
        with pytest.raises(WrongModelError, match=f"got weight version {bad}, expected one above {version}"):
            send_weights([bench.engine], weights_of(bench.model), version=bad, transport=bench.transport)
    assert bench.engine.weight_version == version and bench.error() < LOGP, "a refused version changes nothing"


def test_weights_set_by_somebody_else_are_noticed(bench):
    bench.send()
    version = bench.engine.weight_version
    httpx.post(bench.engine.name + "/update_weight_version", json={"new_version": "999"}).raise_for_status()
    with pytest.raises(EngineError, match=f"weight version.s. 999, expected {version} alone"):
        bench.ask()
    assert bench.engine.health() is Health.STALE, "none of its answers is one of ours"
    httpx.post(bench.engine.name + "/update_weight_version", json={"new_version": str(version)}).raise_for_status()
    bench.send()
    assert bench.error() < LOGP


def _without(name):
    return lambda weights: [(n, t) for n, t in weights if n != name]


KEY = "model.layers.1.self_attn.k_proj.weight"
WRONG = {
    "head missing": (_without("lm_head.weight"), r"not full, 1 missing \(lm_head.weight\)"),
    "one of three fused": (_without(KEY), rf"not full, 1 missing \({KEY}\)"),
    "unexpected": (lambda w: [*w, ("model.foo", w[0][1])], "unexpected tensor model.foo, expected Hugging Face's names such as model.embed"),
    "twice": (lambda w: [*w, w[0]], "model.embed_tokens.weight came twice"),
    "other vocabulary": (lambda w: [(n, t[:-1] if n == "lm_head.weight" else t) for n, t in w], r"lm_head.weight: got a shape of \(319, 128\), expected \(320, 128\)"),
    "transposed": (lambda w: [(n, t.mT if n == KEY else t) for n, t in w], rf"{KEY}: got a shape of \(128, 64\), expected \(64, 128\)"),
    "other dtype": (lambda w: [(n, t.bfloat16()) for n, t in w], "model.embed_tokens.weight: got bfloat16, expected float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("bucket_bytes", [512 << 20, 64 << 10], ids=["one bucket", "many"])
def test_weights_of_another_model_are_refused(bench, case, bucket_bytes):
    """The engine never generates with half an update, and takes the next one."""
    bench.send()
    change(bench.model)
    spoil, message = WRONG[case]
    with pytest.raises(WrongModelError, match=message):
        bench.send(spoil(weights_of(bench.model)), bucket_bytes=bucket_bytes)
    assert bench.engine.health() is Health.STALE
    with pytest.raises(EngineError, match="STALE"):
        bench.ask()
    bench.send()
    assert bench.error() < LOGP


def test_bytes_that_changed_on_the_way_are_noticed(bench):
    class Careless(SharedMemory):
        def write(self, offset, data):
            super().write(offset, data.clone().add_(torch.arange(data.numel()) == 70) if offset else data)

    with pytest.raises(EngineError, match="got checksum [0-9a-f]{8}, expected [0-9a-f]{8}: its bytes changed") as refusal:
        send_weights([bench.engine], weights_of(bench.model), version=bench.engine.newest_version + 1, transport=Careless(), checksums=True)
    assert type(refusal.value) is EngineError, "the engine is well: neither lost nor another model's"
    assert bench.engine.health() is Health.STALE
    bench.send(checksums=True)
    assert bench.error() < LOGP


def test_a_trainer_that_died_in_an_update_is_followed_by_another(bench):
    """A second client finds the server in the middle of an update, and brings it a full one; the first must not fall behind that."""
    version = bench.engine.newest_version + 1
    bench.engine.begin_update(version)
    other = connect_engine(bench.engine.name, describe_model(bench.folder))
    assert other.health() is Health.STALE
    send_weights([other], weights_of(bench.model), version=version + 5, transport=bench.transport)
    completions = other.generate(PROMPT, SamplingParams(max_tokens=8), timeout_s=LIMIT_S)
    assert worst_error(bench.model, PROMPT, completions) < LOGP
    other.close()
    bench.engine.abort_update()
    with pytest.raises(WrongModelError, match=f"got weight version {version + 1}, expected one above {version + 5}"):
        bench.engine.begin_update(version + 1)
    bench.send()
    assert bench.error() < LOGP


def test_servers_of_another_model_are_refused(bench):
    right = describe_model(bench.folder, dtype="float32", max_model_len=512)
    connect_engine(bench.engine.name, right).close()
    with pytest.raises(WrongModelError, match="rope_theta=10000.0, expected 5.0"):
        connect_engine(bench.engine.name, ModelDescription(**vars(right) | {"computation": {**right.computation, "rope_theta": 5.0}}))
    for item, value in dict(architecture="LlamaForCausalLM", vocab_size=321, hidden_size=64, layers=3, tied=True, dtype="bfloat16", max_model_len=513).items():
        with pytest.raises(WrongModelError, match=f"{item}=.*, expected {value}"):
            connect_engine(bench.engine.name, ModelDescription(**vars(right) | {item: value}))


def test_pause_holds_requests_and_resume_lets_them_go(bench):
    bench.send()
    bench.engine.pause()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(bench.ask()))
    thread.start()
    time.sleep(0.7)
    assert not answers
    bench.engine.resume()
    thread.join(LIMIT_S)
    assert worst_error(bench.model, PROMPT, answers[0]) < LOGP


def test_sleep_and_wake(bench):
    """Nothing is freed on a CPU; the states are those of a GPU."""
    bench.send()
    bench.engine.sleep()
    with pytest.raises(EngineError, match="asleep"):
        bench.ask()
    bench.engine.wake()
    assert bench.error() < LOGP
    bench.engine.sleep(level=2)
    bench.engine.wake()
    assert bench.engine.health() is Health.STALE, "level 2 drops the weights"
    bench.send()


def test_a_server_that_hangs_is_lost_at_the_deadline(bench):
    bench.send()
    server = bench.engine.process.popen.pid
    os.kill(server, signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(EngineLostError, match="no answer within 1 s"):
            bench.engine.generate(PROMPT, SamplingParams(max_tokens=4), timeout_s=1.0)
        assert time.monotonic() - start < 3
    finally:
        os.kill(server, signal.SIGCONT)
    assert bench.error() < LOGP


def test_killed_in_the_middle_of_a_generation_and_brought_back(bench):
    """Last: the server of the tests above dies here."""
    bench.send()
    version, old = bench.engine.weight_version, bench.engine.process.popen.pid
    threading.Timer(0.5, os.kill, (old, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(EngineLostError):
        bench.ask(n=64, max_tokens=200)
    assert time.monotonic() - start < 10
    assert bench.engine.health() is Health.DEAD
    bench.engine.restart()
    assert not _members(old) and bench.engine.health() is Health.STALE
    with pytest.raises(EngineError, match="STALE"):
        bench.ask()
    send_weights([bench.engine], weights_of(bench.model), version=version + 1, transport=bench.transport)
    assert bench.error() < LOGP
