"""The command, the environment and the failures of a vLLM child process; what it samples is in test_vllm_engine.py."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from megatron_plugin.config import ConfigError
from megatron_plugin.rollout import server_log, vllm_process
from megatron_plugin.rollout.engine import EngineLostError, WrongModelError
from megatron_plugin.rollout.expected_weights import ExpectedWeights
from megatron_plugin.rollout.serve import serve
from megatron_plugin.rollout.vllm_http import connect_engine, start_engine
from megatron_plugin.rollout.vllm_model import ModelDescription, check_cpu_heads, describe_model
from megatron_plugin.rollout.vllm_process import EngineOptions, _members, server_command, server_environment, start_server
from megatron_plugin.rollout.vllm_versions import TESTED, check_vllm, installed_vllm
from tests.rollout.vllm_models import config_of, make_model, weights_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config_of("qwen2").save_pretrained(folder)
    return str(folder)


def _options(folder, **options):
    return EngineOptions(model_dir=folder, dtype="float32", max_model_len=4096, **options)


def test_the_command(folder):
    command = server_command(_options(folder, extra_args=("--swap-space", "1")), "127.0.0.1", 8123)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"] and command[-2:] == ["--swap-space", "1"]
    value = dict(zip(command, command[1:], strict=False))
    assert value["--logprobs-mode"] == "processed_logprobs" and value["--load-format"] == "dummy" and value["--generation-config"] == "vllm"
    assert value["--weight-transfer-config"] == '{"backend": "megatron_plugin_shm"}' and value["--host"] == "127.0.0.1"
    # a seeded request whose prompt is cut into chunks kills the engine on a CPU
    assert "--no-enable-chunked-prefill" in command and int(value["--max-num-batched-tokens"]) >= 4096


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "::", "", "example.org", "127.example.org", "127.0.0.1.example.org"])
def test_a_public_address_needs_a_permission(folder, host):
    with pytest.raises(ValueError, match="can be reached from other machines.*expected 127.0.0.1"):
        server_command(_options(folder), host, 8123)
    assert host in server_command(_options(folder), host, 8123, allow_public=True)
    for private in ("127.0.0.1", "127.8.0.1", "localhost", "::1"):
        server_command(_options(folder), private, 8123)


def test_the_environment(folder):
    parent = {"PATH": "/bin", "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}
    environment = server_environment(_options(folder, threads=2, devices="1", extra_env={"A": "b"}), parent)
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(environment), "vLLM would join the trainer's group"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["OMP_NUM_THREADS"] == "2" and environment["A"] == "b"
    assert environment["CUDA_VISIBLE_DEVICES"] == "1" and environment["PATH"] == "/bin"


@pytest.mark.parametrize("value", ["1", "0"])
def test_pickle_over_http_is_refused(folder, value, monkeypatch):
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    with pytest.raises(ValueError, match=f"got {name} in the environment, expected it unset"):
        server_environment(_options(folder, extra_env={name: value}), {})
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        start_engine(_options(folder))


def test_options_that_cannot_start(folder, tmp_path):
    with pytest.raises(ValueError, match="transfer='ipc': expected one of shm, gloo, nccl"):
        _options(folder, transfer="ipc")
    with pytest.raises(ValueError, match="no config.json there"):
        _options(str(tmp_path))


@pytest.mark.parametrize(
    "fields, size",
    [(dict(head_dim=16), 16), (dict(num_attention_heads=8), 16), (dict(num_attention_heads=2, head_dim=40), 40), (dict(head_dim=None, hidden_size=96, num_attention_heads=4), 24)],
)  # fmt: skip
def test_heads_that_vllm_cannot_serve_on_a_cpu(tmp_path, monkeypatch, fields, size):
    """Said before anything is started; vLLM's own word is "Unsupported CPU attention configuration", at the end of a log, half a minute later."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(dict(hidden_size=128, num_attention_heads=4) | fields))
    with pytest.raises(ValueError, match=rf"heads of size {size} .*expected one of 32, 48, 64, .*no CPU kernels.*model.kv_channels.* on a GPU"):
        _options(str(tmp_path))
    with pytest.raises(ConfigError, match=f"serve: got attention heads of size {size}"):
        serve(str(tmp_path), host="127.0.0.1", port=1, public=False, dtype="bf16", memory=0.0, log="", options={})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    _options(str(tmp_path), transfer="nccl")


@pytest.mark.parametrize("fields", [dict(num_attention_heads=4), dict(head_dim=48, num_attention_heads=7), dict(num_attention_heads=8, kv_lora_rank=512), {}])
def test_heads_that_can_be_served_or_are_not_known(fields):
    check_cpu_heads(dict(hidden_size=128) | fields)


HEADS = """
import importlib.util, pathlib, torch
from megatron_plugin.rollout.vllm_model import CPU_HEAD_SIZES

folder = pathlib.Path(importlib.util.find_spec("vllm").submodule_search_locations[0])  # not imported: the kernels alone take 2 s instead of 10
torch.ops.load_library(folder / ("_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"))

def served(size, dtype):
    one, ends = torch.tensor([4], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    try:  # the instruction sets that cpu_attn.py:_get_attn_isa chooses on a CPU without AMX
        torch.ops._C.get_scheduler_metadata(1, 2, 2, size, one, dtype, ends, True, -1, "vec16" if size % 32 else "vec", False, None, "auto")
    except RuntimeError as error:
        assert "Unsupported CPU attention configuration" in str(error), error
        return False
    return True

for dtype in (torch.float32, torch.bfloat16):
    assert tuple(size for size in range(8, 600, 8) if served(size, dtype)) == CPU_HEAD_SIZES, dtype
"""


@pytest.mark.skipif(not (installed_vllm() == TESTED and metadata.version("torch").endswith("+cpu")), reason=f"asks the CPU kernels of vLLM {TESTED}")
def test_the_sizes_of_heads_are_those_of_vllms_kernels():
    subprocess.run([sys.executable, "-c", HEADS], check=True, cwd=ROOT)


def test_versions():
    assert check_vllm(TESTED) == TESTED and check_vllm("0.27.1") and check_vllm("0.32.0+cpu") and check_vllm("0.32.3")
    for version in ("0.27.0", "0.33.0", "1.0", "0.11.2+cu128"):
        with pytest.raises(RuntimeError, match=f"got vLLM {version.replace('+', '.')}, expected 0.27.1 to 0.32"):
            check_vllm(version)


@pytest.fixture
def fake_vllm(vllm, folder, tmp_path):
    """Options of a server that is one line of Python, found before the real vllm, which takes 12 s to refuse anything."""
    fake = tmp_path / "vllm" / "entrypoints" / "openai"
    fake.mkdir(parents=True)
    for package in (tmp_path / "vllm", fake.parent, fake):
        (package / "__init__.py").touch()

    def options(line):
        (fake / "api_server.py").write_text(line)
        return _options(folder, log=str(tmp_path / "logs" / "engine.log"), extra_env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"})

    return options


def test_a_server_that_does_not_start_says_why(fake_vllm):
    with pytest.raises(EngineLostError, match=r"(?s)ended with exit code 1 after .* s; the end of .*engine.log:.*error: no room for the cache"):
        start_server(fake_vllm("raise SystemExit('error: no room for the cache')"))


def test_a_restart_keeps_what_the_death_left_in_the_log(fake_vllm, tmp_path):
    """An error at a start shows the lines of that start only: those of the death before it would explain the wrong thing."""
    for status, shown in (("'error: first death'", "first death"), ("'error: second'", "second"), ("1", "")):
        with pytest.raises(EngineLostError, match="ended with exit code 1") as caught:
            start_server(fake_vllm(f"raise SystemExit({status})"))
        words = str(caught.value)
        assert [word for word in ("first death", "second") if word in words] == [word for word in (shown,) if word]
    log = (tmp_path / "logs" / "engine.log").read_text()
    assert log.index("first death") < log.index("second") and log.count("==== vLLM is started") == 3


def test_a_start_that_takes_long_says_so(fake_vllm, monkeypatch, caplog):
    """With the last line of the log; and a log that fills the disk is cut, its end kept."""
    monkeypatch.setattr(vllm_process, "SAY_S", 0.5)
    options = fake_vllm("import time; print('loading the kernels', flush=True); time.sleep(60)")
    log = Path(options.log)
    log.parent.mkdir()
    log.write_bytes(b"old\n" * 100 + b"x" * (64 << 20) + b"the end of it\n")
    with pytest.raises(EngineLostError, match="is not ready after"):
        start_server(replace(options, start_timeout_s=3.0))
    said = [record.message for record in caplog.records if "is not ready after" in record.message]
    assert 2 <= len(said) <= 6 and said[-1].endswith("engine.log: loading the kernels")
    assert log.stat().st_size < 1 << 20 and (log.parent / "engine.log.1").read_bytes().endswith(b"xxx" + b"the end of it\n")


def test_a_log_that_is_appended_to_may_be_emptied_behind_its_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(server_log, "LOG_BYTES", 100)
    monkeypatch.setattr(server_log, "KEPT_BYTES", 10)
    path = tmp_path / "engine.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        assert not server_log.cap_log(path)
        writer.write(b"b" * 5)
        assert server_log.cap_log(path) and path.stat().st_size == 0
        writer.write(b"again")
    assert path.read_bytes() == b"again" and (tmp_path / "engine.log.1").read_bytes() == b"a" * 5 + b"b" * 5


def test_a_log_is_emptied_where_its_end_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(server_log, "LOG_BYTES", 100)
    monkeypatch.setattr(server_log, "KEPT_BYTES", 10)
    path = tmp_path / "engine.log"
    path.write_bytes(b"a" * 101)
    (tmp_path / "engine.log.1").mkdir()  # refuses to be written, as a full disk does
    assert server_log.cap_log(path) and path.stat().st_size == 0


def test_a_server_that_takes_too_long_is_ended(vllm, folder, tmp_path):
    before = set(_children())
    with pytest.raises(EngineLostError, match="is not ready after"):
        start_server(_options(folder, log=str(tmp_path / "engine.log"), start_timeout_s=1.0))
    assert not {c for c in _children() if c not in before}


def _children():
    return [int(p) for p in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()]


WATCHED = """
import os, subprocess, sys, time
from megatron_plugin.rollout.watchdog import watch_parent
watch_parent()
if sys.argv[1] == "engine":
    subprocess.Popen([sys.executable, "-c", os.environ["WATCHED"], "worker"])
print(os.getpid(), flush=True)
time.sleep(120)
"""
OWNER = """
import os, subprocess, sys, time
os.environ["MEGATRON_PLUGIN_OWNER"] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", os.environ["WATCHED"], "engine"], start_new_session=True)
time.sleep(120)
"""


def test_the_watchdog_ends_a_chain_of_processes():
    """Owner, engine, worker; the owner is killed.  Without vLLM, which takes half a minute to show it (test_vllm_server.py)."""
    environment = os.environ | {"WATCHED": WATCHED, "PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, text=True)
    watched = [int(owner.stdout.readline()) for _ in range(2)]
    assert all(Path(f"/proc/{pid}").exists() for pid in watched)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in watched if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_the_watchdog_ends_a_process_whose_parent_is_gone_already():
    """The owner lives: a server that was killed while its engine process was importing."""
    parent = "import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.7)\\n' + os.environ['WATCHED'], 'worker'])"
    environment = os.environ | {"WATCHED": WATCHED, "PYTHONPATH": str(ROOT), "MEGATRON_PLUGIN_OWNER": str(os.getpid())}
    with subprocess.Popen([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, text=True) as gone:
        gone.wait()
        said = gone.stdout.readline()  # a process id, or nothing where it was killed before it could say so
    deadline = time.monotonic() + 10
    while said and (left := _alive(int(said))) and time.monotonic() < deadline:
        time.sleep(0.05)
    if said and left:
        os.kill(int(said), signal.SIGKILL)
        pytest.fail("it lives on without its parent")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_of_a_group():
    process = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"], start_new_session=True)
    while len(_members(process.pid)) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10  # its child, which nobody here waits for
    while _members(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _members(process.pid)


def test_redirects_are_not_followed():
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(Exception, match="/health: HTTP 307"):
        connect_engine(f"http://127.0.0.1:{server.server_port}", ModelDescription(), start_timeout_s=0)
    server.shutdown()


def test_nobody_there(caplog):
    start = time.monotonic()
    with pytest.raises(EngineLostError, match="127.0.0.1:9/health: ConnectError"):
        connect_engine("http://127.0.0.1:9", ModelDescription(), start_timeout_s=1.0)
    said, = caplog.records
    assert said.message.startswith("waiting for rollout server http://127.0.0.1:9, 0 of 1 s: ") and "refused" in said.message
    assert 1.0 < time.monotonic() - start < 10


def test_describing_a_model(folder):
    assert describe_model(folder, dtype="float32") == ModelDescription(
        architecture="Qwen2ForCausalLM", vocab_size=320, hidden_size=128, layers=2, tied=False, dtype="float32",
        computation={"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    )  # fmt: skip


def test_the_same_shapes_computed_with_otherwise_are_another_model(folder):
    own = describe_model(folder)
    served = vars(own) | {"computation": {**own.computation, "rope_theta": 500000.0}}
    with pytest.raises(WrongModelError, match="engine0: got a server whose config.json has rope_theta=500000.0, expected 10000.0"):
        own.check(served, "engine0")
    own.check(vars(own), "engine0")
    own.check(vars(own) | {"computation": None}, "an engine that cannot say")


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("qwen3", True), ("llama", False), ("llama", True)])
def test_expected_weights_are_those_of_a_checkpoint(tmp_path, kind, tied):
    model = make_model(tmp_path, kind, tied=tied)
    sent = [(name, "float32", list(t.shape)) for name, t in weights_of(model)]
    expected = ExpectedWeights(model.config, "float32")
    assert expected.missing() == [name for name, _, _ in sent]
    expected.check(*map(list, zip(*sent, strict=True)))
    assert expected.missing() == []
    expected.restart()
    expected.check(*map(list, zip(*sent[1:], strict=True)))
    assert expected.missing() == [sent[0][0]]
    with pytest.raises(ValueError, match=f"{sent[1][0]} came twice"):
        expected.check(*([x] for x in sent[1]))
