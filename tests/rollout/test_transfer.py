"""Buckets and transports, with receivers that run what runs inside vLLM.  No vLLM is needed."""

import json
import os
import stat
import threading
import weakref

import psutil
import pytest
import torch

from megatron_plugin.rollout.engine import EngineError, EngineLostError
from megatron_plugin.rollout.transfer import TRANSPORTS, send_weights
from megatron_plugin.rollout.transports.bucket import ALIGNMENT, Manifest, as_bytes, tensors_of
from megatron_plugin.rollout.transports.gloo import Gloo
from megatron_plugin.rollout.transports.shm import PREFIX, SharedMemory
from tests.rollout.receiver import Receiver

KIB = 1024


@pytest.fixture(params=["shm", "gloo"])
def transport(request, tmp_path):
    transport = SharedMemory(tmp_path) if request.param == "shm" else Gloo(timeout_s=20)
    yield transport
    transport.close()
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def weights():
    """Odd sizes, all dtypes of a checkpoint, a strided one, a scalar, an empty one, one much larger than a bucket."""
    large = torch.randn(700, 37)
    return [("a", torch.randn(5, 3)), ("b", torch.randn(257).bfloat16()), ("large", large), ("c", torch.randn(6, 10).t()), ("d", torch.randn(33).half()),
            ("scalar", torch.tensor(3.5)), ("empty", torch.empty(0, 4)), ("ids", torch.arange(9))]  # fmt: skip


@pytest.mark.parametrize("bucket_bytes", [1, KIB, 1 << 20])
@pytest.mark.parametrize("checksums", [False, True])
def test_every_engine_gets_every_tensor_bit_by_bit(transport, bucket_bytes, checksums):
    engines, sent = [Receiver(transport) for _ in range(3)], weights()
    for version in (1, 2):  # a transport is used again
        report = send_weights(engines, sent, version=version, transport=transport, bucket_bytes=bucket_bytes, checksums=checksums)
    for engine in engines:
        assert list(engine.weights) == [name for name, _ in sent]
        for name, tensor in sent:
            assert engine.weights[name].dtype == tensor.dtype and torch.equal(engine.weights[name], tensor), name
        assert len(engine.sizes) == report.buckets
        assert all(size <= bucket_bytes or size == 700 * 37 * 4 for size in engine.sizes) or bucket_bytes == 1
    assert report.bytes == sum(t.numel() * t.element_size() for _, t in sent)
    assert report.buckets == {1: len(sent) - 1, KIB: 3, 1 << 20: 1}[bucket_bytes]
    assert report.lost == () and report.seconds > 0


def test_floating_point_is_cast_to_the_engines_dtype(transport):
    engine = Receiver(transport)
    send_weights([engine], weights(), version=1, transport=transport, dtype=torch.bfloat16)
    assert {t.dtype for n, t in engine.weights.items() if n != "ids"} == {torch.bfloat16} and engine.weights["ids"].dtype == torch.int64


def test_tensors_go_as_they_come(transport):
    """Of a model no more than what the bucket holds is alive: the gathered tensor of before has gone when the next one is made."""
    made = []

    def stream():
        for i in range(20):
            assert sum(ref() is not None for ref in made) <= 1, "tensors pile up"
            tensor = torch.full((1000,), float(i))
            made.append(weakref.ref(tensor))
            yield f"t{i}", tensor

    engine = Receiver(transport)
    assert send_weights([engine], stream(), version=1, transport=transport, bucket_bytes=16 * KIB).buckets == 5
    assert engine.weights["t19"].eq(19).all()


class Counted:
    """An iterable that says whether it was exhausted: other ranks may be waiting in its collectives."""

    def __init__(self):
        self.left = len(weights())

    def __iter__(self):
        for item in weights():
            self.left -= 1
            yield item


@pytest.mark.parametrize("method", ["begin_update", "push", "finish_update", "init_transfer"])
def test_a_refusal_is_raised_after_all_tensors_and_after_the_others_forgot(transport, method):
    if method == "init_transfer" and isinstance(transport, SharedMemory):
        method = "push"
    tensors = Counted()
    engines = [Receiver(transport), Receiver(transport, fail={method: EngineError("no")})]
    with pytest.raises(EngineError, match="^no$"):
        send_weights(engines, tensors, version=1, transport=transport, bucket_bytes=KIB)
    assert tensors.left == 0
    assert all(engine.calls[-1] == "abort_update" for engine in engines)
    engines[1].fail.clear()
    send_weights(engines, weights(), version=2, transport=transport)
    assert all(len(engine.weights) == len(weights()) for engine in engines)


@pytest.mark.parametrize("die_at", [0, 2])
def test_an_engine_that_dies_is_reported_and_the_others_go_on(transport, die_at):
    engines, tensors = [Receiver(transport), Receiver(transport, die_at=die_at), Receiver(transport)], Counted()
    report = send_weights(engines, tensors, version=1, transport=transport, bucket_bytes=KIB)
    assert report.lost == (engines[1],) and tensors.left == 0
    assert all(engine.calls[-1] == "finish_update" and len(engine.weights) == len(weights()) for engine in (engines[0], engines[2]))
    assert "finish_update" not in engines[1].calls


def test_all_engines_lost_or_none_there(transport):
    for engines in ([], [Receiver(transport, fail={"begin_update": EngineLostError("gone")})]):
        tensors = Counted()
        report = send_weights(engines, tensors, version=1, transport=transport)
        assert tensors.left == 0 and list(report.lost) == engines


def test_a_bucket_that_only_its_padding_overfills(transport):
    """60 bytes of a, padded to 64, and 960 of b are within 1023 bytes without the padding only."""
    engine = Receiver(transport)
    send_weights([engine], [("a", torch.ones(15)), ("b", torch.ones(240))], version=1, transport=transport, bucket_bytes=1023)
    assert engine.sizes == [60, 960]


def test_what_the_tensors_raise_is_raised(transport):
    def stream():
        yield from weights()[:3]
        raise RuntimeError("rank 3 is out of memory")

    engine = Receiver(transport)
    with pytest.raises(RuntimeError, match="rank 3 is out of memory"):
        send_weights([engine], stream(), version=1, transport=transport, bucket_bytes=KIB)
    assert engine.calls[-1] == "abort_update"


def test_an_engine_started_for_another_transport(transport):
    engine = Receiver(transport)
    engine.backend = "nccl"
    with pytest.raises(EngineError, match=f"takes weights by nccl, expected {transport.backend}"):
        send_weights([engine], weights(), version=1, transport=transport)
    assert "begin_update" not in engine.calls


def test_bytes_that_changed_are_noticed_with_checksums_only(transport):
    class Careless(type(transport)):
        def write(self, offset, data):
            super().write(offset, data.flip(0))  # the same bytes in another order: a sum would not see it

    transport.__class__ = Careless
    send_weights([Receiver(transport)], weights(), version=1, transport=transport)
    with pytest.raises(EngineError, match="a: got checksum"):
        send_weights([Receiver(transport)], weights(), version=2, transport=transport, checksums=True)


def test_shared_memory_is_one_private_file_at_a_time(tmp_path):
    transport, seen = SharedMemory(tmp_path), []

    def look():
        (path,) = tmp_path.iterdir()
        seen.append(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    engine = Receiver(transport)
    engine.at_push = look
    send_weights([engine], weights(), version=1, transport=transport, bucket_bytes=KIB)
    assert len(set(seen)) == len(seen) == 3, "a file is never written over: vLLM may still hold views of it"
    assert not list(tmp_path.iterdir())


def test_no_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    transport, tensors = SharedMemory(tmp_path), Counted()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(EngineError, match="no room for .* bytes of weights .*No space left.*lower rollout.bucket_mb"):
        send_weights([Receiver(transport)], tensors, version=1, transport=transport)
    assert tensors.left == 0 and not list(tmp_path.iterdir())


def test_gloo_listens_where_it_is_told_and_nowhere_else():
    transport, heard = Gloo("127.0.0.1"), []
    engine = Receiver(transport)
    engine.at_push = lambda: heard.extend(c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    send_weights([engine], weights(), version=1, transport=transport)
    assert heard and set(heard) == {"127.0.0.1"}
    for address in ("0.0.0.0", "::", "", "203.0.113.7"):
        with pytest.raises(ValueError, match="to listen on for weight transfer, expected"):
            Gloo(address)
    transport.close()


def test_an_engine_that_cannot_reach_the_trainer_is_lost():
    transport = Gloo(timeout_s=0.5)
    engine = Receiver(transport)
    gone = threading.Event()
    engine.init_transfer = lambda invitation: gone.wait(10)
    report = send_weights([engine], weights(), version=1, transport=transport)
    assert report.lost == (engine,)
    gone.set()
    transport.close()


def test_the_default_process_group_is_left_alone():
    transport = Gloo()
    send_weights([Receiver(transport)], weights(), version=1, transport=transport)
    assert not torch.distributed.is_initialized()


def test_a_manifest_travels_as_json():
    manifest, data = Manifest(), torch.zeros(4 * KIB, dtype=torch.uint8)
    for name, tensor in weights()[:2]:
        raw = as_bytes(tensor)
        offset = manifest.add(name, tensor, raw, checksum=True)
        assert offset % ALIGNMENT == 0
        data[offset : offset + raw.numel()] = raw
    again = Manifest.of(json.loads(json.dumps(vars(manifest))))
    assert [name for name, _ in tensors_of(again, data)] == ["a", "b"]


BAD = {
    "outside": (dict(offsets=[4096]), "got bytes 4096 to 4156, expected them inside the bucket of 4096"),
    "negative": (dict(offsets=[-64]), "got bytes -64 to -4"),
    "dtype": (dict(dtypes=["__class__"]), "got dtype '__class__', expected one of torch's"),
    "lists": (dict(names=["a", "b"]), "got an update of 2 names with lists of"),
    "checksum": (dict(crc32=[1]), "got checksum"),
}


@pytest.mark.parametrize("case", BAD)
def test_manifests_that_lie(case):
    change, message = BAD[case]
    manifest, data = Manifest(), torch.zeros(4 * KIB, dtype=torch.uint8)
    tensor = weights()[0][1]
    manifest.add("a", tensor, as_bytes(tensor), checksum=False)
    with pytest.raises(ValueError, match=message):
        list(tensors_of(Manifest.of(vars(manifest) | change), data))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="got bucket_bytes=0"):
        send_weights([], [], version=1, transport=SharedMemory(tmp_path), bucket_bytes=0)
    with pytest.raises(ValueError, match="expected a folder that trainer and engines see"):
        SharedMemory(tmp_path / "nowhere")
    assert set(TRANSPORTS) == {"shm", "gloo", "nccl"}
