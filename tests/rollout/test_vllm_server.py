"""A vLLM server that belongs to another process, a tied model, weights through gloo.  At the end its owner is killed, and the server goes with it.

One server for the file; the last test ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_plugin.rollout.engine import EngineError, EngineLostError, Health, SamplingParams, WrongModelError
from megatron_plugin.rollout.transfer import send_weights
from megatron_plugin.rollout.transports.bucket import Manifest
from megatron_plugin.rollout.transports.gloo import Gloo
from megatron_plugin.rollout.transports.shm import SharedMemory
from megatron_plugin.rollout.vllm_http import connect_engine
from megatron_plugin.rollout.vllm_model import describe_model
from megatron_plugin.rollout.vllm_process import _members
from tests.rollout.conftest import shared_files
from tests.rollout.vllm_models import LOGP, PROMPT, change, make_model, weights_of, worst_error

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench(vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, files = make_model(folder, "qwen3", tied=True), shared_files()
    command = [sys.executable, "-m", "tests.rollout.vllm_owner", str(folder)]
    owner = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url, server = owner.stdout.readline().split()
        engine = connect_engine(url, describe_model(str(folder), dtype="float32"))
        yield SimpleNamespace(model=model, owner=owner, server=int(server), engine=engine, transport=Gloo(), folder=str(folder), files=files)
    finally:
        owner.kill()
        owner.wait()


def _send(bench, transport=None, **options):
    return send_weights([bench.engine], weights_of(bench.model), version=bench.engine.newest_version + 1, transport=transport or bench.transport, **options)


def _error(bench, **params):
    completions = bench.engine.generate(PROMPT, SamplingParams(**dict(max_tokens=16, n=4, seed=1) | params), timeout_s=60)
    return worst_error(bench.model, PROMPT, completions, params.get("temperature", 1.0))


# a tied head keeps a prepacked copy of the embedding on a CPU, which vLLM's own reload leaves old
@pytest.mark.parametrize("bucket_bytes, checksums", [(512 << 20, False), (64 << 10, True), (64 << 10, False)])
def test_a_tied_model_has_the_new_weights_in_its_head(bench, bucket_bytes, checksums):
    change(bench.model)
    report = _send(bench, bucket_bytes=bucket_bytes, checksums=checksums)
    assert report.bytes == sum(t.numel() * 4 for _, t in weights_of(bench.model)) and report.lost == ()
    assert bench.engine.health() is Health.HEALTHY
    assert _error(bench) < LOGP and _error(bench, temperature=0.7) < LOGP


def test_refusals_reach_the_trainer_through_a_broadcast(bench):
    """The engine takes part in the broadcast before it looks, so nobody waits for anybody."""
    start = time.monotonic()
    for spoiled, message in [
        (weights_of(bench.model)[:-1], "not full, 1 missing"),
        ([(n, t[..., :-1]) for n, t in weights_of(bench.model)], "got a shape of"),
    ]:
        with pytest.raises(WrongModelError, match=message):
            send_weights([bench.engine], spoiled, version=bench.engine.newest_version + 1, transport=bench.transport, bucket_bytes=64 << 10)
    assert time.monotonic() - start < 10
    _send(bench)
    assert _error(bench) < LOGP


def test_shared_memory_to_an_engine_that_was_started_for_gloo(bench):
    _send(bench)
    with pytest.raises(EngineError, match="takes weights by megatron_plugin_gloo, expected megatron_plugin_shm"):
        _send(bench, SharedMemory())
    assert bench.engine.health() is Health.HEALTHY, "nothing was begun"
    bench.engine.begin_update(bench.engine.newest_version + 1)
    with pytest.raises(EngineError, match="without an invitation"):
        bench.engine.push({**vars(Manifest()), "path": "/dev/shm/nothing"})
    _send(bench)
    assert _error(bench) < LOGP


def test_no_proxy_and_no_redirect(bench, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    engine = connect_engine(bench.engine.name, describe_model(bench.folder))
    assert engine.health() is Health.STALE
    engine.close()


def test_closing_leaves_a_server_of_somebody_else_running(bench):
    engine = connect_engine(bench.engine.name, describe_model(bench.folder))
    engine.close()
    assert engine.health() is Health.SUSPECT, "our end is closed, and nothing says that the server is dead"
    assert bench.engine.health() is not Health.DEAD
    engine.restart()
    assert engine.health() is Health.STALE
    engine.close()


def test_a_second_trainer_is_refused_until_the_first_has_ended(bench):
    expected = describe_model(bench.folder)
    first = connect_engine(bench.engine.name, expected, owner="node0:/runs/a")
    with pytest.raises(EngineError, match="got a server that node0:/runs/a sends weights to"):
        connect_engine(bench.engine.name, expected, owner="node0:/runs/b")
    connect_engine(bench.engine.name, expected, owner="node0:/runs/a")  # the same run, resumed
    first.close()
    connect_engine(bench.engine.name, expected, owner="node0:/runs/b").close()


def test_the_server_ends_with_its_owner(bench):
    """Last.  However the owner went: no orphan, no shared memory, and the trainer is told."""
    _send(bench)
    assert len(_members(bench.server)) >= 2, "the server and its engine"
    os.kill(bench.owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while (left := _members(bench.server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert shared_files() <= bench.files
    with pytest.raises(EngineLostError):
        _error(bench)
    assert bench.engine.health() is Health.SUSPECT, "nobody answers there: a fleet calls it DEAD after three probes (rollout/slots.py)"
    report = send_weights([bench.engine], weights_of(bench.model), version=bench.engine.newest_version + 1, transport=bench.transport)
    assert report.lost == (bench.engine,)
    bench.engine.start_timeout_s = 1.0
    with pytest.raises(EngineLostError):
        bench.engine.restart()
