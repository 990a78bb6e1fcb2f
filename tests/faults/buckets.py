"""A weight update that is cut off after each of its buckets: the server dies, the trainer dies, or what makes the tensors fails.

Real vLLM in full: one engine, started again after each of its deaths; trainers are forks that kill themselves.  Quick: an HTTP server that closes."""

from __future__ import annotations

import os
import signal
import time

from megatron_plugin.rollout.engine import EngineError, Health, SamplingParams
from megatron_plugin.rollout.fleet import Fleet, Request
from megatron_plugin.rollout.transfer import send_weights
from megatron_plugin.rollout.transports.shm import SharedMemory
from tests.faults.kills import AtBucket, Bench, bench
from tests.faults.promises import Case

PROMISE = ("a weight update cut off after any of its buckets, by the server's death, the trainer's, or an error: nothing is generated with part of it, and "
           "the next whole update makes the engine good (version, checksums, Hugging Face's log-probabilities)")  # fmt: skip
BUCKETS = 7  # that the bench's model makes at 256 KiB
BUCKET_BYTES = 256 << 10


def cases(*, full: bool) -> list[Case]:
    if not full:
        return [Case("a server that closes", lambda path: fake(), 4), Case("tensors that fail", lambda path: fake_tensors(), 4)]
    found = [Case(f"server dies after {n}", lambda path, n=n: server_dies(n)) for n in range(1, BUCKETS, 2)]
    found += [Case(f"trainer dies after {n}", lambda path, n=n: trainer_dies(n)) for n in range(1, BUCKETS + 1)]
    return found + [Case(f"tensors fail after {n}", lambda path, n=n: tensors_fail(n)) for n in range(1, BUCKETS)]


def _fresh() -> Bench:
    b = bench()
    b.bucket_bytes = BUCKET_BYTES
    if b.engine.health() is Health.DEAD:
        b.engine.restart()
    b.send()
    return b


def _is_stale(engine) -> None:
    """Nothing can be had from it: neither by asking it nor through a fleet."""
    assert engine.health() in (Health.STALE, Health.DEAD, Health.SUSPECT), f"{engine.health()} with part of an update"
    try:
        engine.generate([1, 2, 3], SamplingParams(max_tokens=4), timeout_s=5)
    except EngineError as error:
        assert "STALE" in str(error), error
    else:
        raise AssertionError("it generated with part of an update")
    generated = Fleet([engine], timeout_s=5).generate([Request(0, [1, 2, 3], SamplingParams(max_tokens=4))])
    assert not generated.completions and 0 in generated.missing


def _is_good(b: Bench, engine=None) -> None:
    from tests.rollout.vllm_models import LOGP, PROMPT, worst_error

    completions = (engine or b.engine).generate(PROMPT, SamplingParams(n=4, max_tokens=16, seed=1), timeout_s=60)
    assert {c.weight_version for c in completions} == {b.version}
    error = worst_error(b.model, PROMPT, completions)
    assert error < LOGP, f"log-probabilities {error:.2g} nats from those of the weights that were sent"


def server_dies(after: int) -> float:
    """Seconds from its death until it generates with new weights."""
    b, died = _fresh(), []

    def die() -> None:
        os.kill(b.engine.process.popen.pid, signal.SIGKILL)
        died.append(time.monotonic())

    from tests.rollout.vllm_models import change, weights_of

    change(b.model)
    b.version += 1
    report = b.resend(weights_of(b.model), transport=AtBucket(after, die))
    assert died and report.lost == (b.engine,), "the update was over before the server died"
    _is_stale(b.engine)
    b.engine.restart()
    _is_stale(b.engine)
    b.send()
    _is_good(b)
    return time.monotonic() - died[0]


def trainer_dies(after: int) -> float:
    """A fork sends part of other weights and is killed; another trainer finds the server and brings it a whole set."""
    from megatron_plugin.rollout.vllm_http import connect_engine
    from megatron_plugin.rollout.vllm_model import describe_model
    from tests.rollout.vllm_models import change, weights_of

    b = _fresh()
    change(b.model)
    b.version += 1
    child = os.fork()
    if not child:
        try:
            engine = connect_engine(b.engine.name, describe_model(str(b.folder)))
            transport = AtBucket(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
            send_weights([engine], weights_of(b.model), version=b.version, transport=transport, bucket_bytes=b.bucket_bytes, checksums=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    begin = time.monotonic()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the trainer was not killed: {status}"
    other = connect_engine(b.engine.name, describe_model(str(b.folder)))
    _is_stale(other)
    change(b.model)
    b.version += 1
    send_weights([other], weights_of(b.model), version=b.version, transport=SharedMemory(), bucket_bytes=b.bucket_bytes, checksums=True)
    _is_good(b, other)
    other.close()
    return time.monotonic() - begin


class Fails(RuntimeError):
    """Of what makes the tensors."""


def _failing(weights, after: int, bucket_bytes: int):
    """(name, tensor) until so many buckets are full."""
    sent = 0
    for name, tensor in weights:
        if sent > after * bucket_bytes:
            raise Fails("out of memory")
        sent += tensor.numel() * tensor.element_size()
        yield name, tensor


def tensors_fail(after: int) -> None:
    from tests.rollout.vllm_models import change, weights_of

    b = _fresh()
    change(b.model)
    b.version += 1
    try:
        b.resend(_failing(weights_of(b.model), after - 1, b.bucket_bytes))
    except Fails:
        pass
    else:
        raise AssertionError("the update was over before it failed")
    _is_stale(b.engine)
    b.send()
    _is_good(b)


def _fake_engine():
    from megatron_plugin.rollout.vllm_http import connect_engine
    from megatron_plugin.rollout.vllm_model import ModelDescription
    from tests.rollout.bad_server import BadServer

    server = BadServer()
    return server, connect_engine(server.url, ModelDescription(vocab_size=320), start_timeout_s=5)


def _weights():
    import torch

    return [(f"w{i}", torch.full((256,), float(i))) for i in range(4)]


def fake() -> None:
    """Four tensors, a bucket each; the server closes after 1, 2, 3 and 4 of them."""
    for after in range(1, 5):
        server, engine = _fake_engine()
        transport = AtBucket(after, lambda server=server: (server.shutdown(), server.server_close()))
        report = send_weights([engine], _weights(), version=1, transport=transport, bucket_bytes=1, checksums=True)
        assert report.lost == (engine,)
        _is_stale(engine)


def fake_tensors() -> None:
    for after in range(4):
        server, engine = _fake_engine()
        try:
            send_weights([engine], _failing(_weights(), after, 1000), version=1, transport=SharedMemory(), bucket_bytes=1)
            raise AssertionError("the update was over before it failed")
        except Fails:
            pass
        _is_stale(engine)
        send_weights([engine], _weights(), version=2, transport=SharedMemory(), bucket_bytes=1)
        assert engine.health() is Health.HEALTHY and engine.weight_version == 2
        server.shutdown()
        server.server_close()
