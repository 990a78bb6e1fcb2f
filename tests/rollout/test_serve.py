"""`megatron-plugin serve`: what is refused before vLLM is started, the line that says when it is ready, and its end.  vLLM is a few lines of Python here."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plugin.config import ConfigError
from megatron_plugin.rollout import serve as serve_module
from megatron_plugin.rollout.serve import check_port, serve
from megatron_plugin.rollout.vllm_model import context_length
from megatron_plugin.rollout.vllm_process import _members
from tests.rollout.vllm_models import config_of

ROOT = Path(__file__).parents[2]
SERVER = """
import os, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if self.path == "/die":
            print("out of memory", flush=True)
            threading.Timer(0.1, os._exit, (7,)).start()

print("noise of vLLM", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run directory with engine/config.json in it."""
    folder = tmp_path_factory.mktemp("run")
    config_of("qwen2").save_pretrained(folder / "engine")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(folder, **options):
    serve(str(folder), **dict(host="127.0.0.1", port=free_port(), public=False, dtype="fp32", memory=0.0, log="", options={"transfer": "gloo"}) | options)


@pytest.fixture
def started(monkeypatch):
    """Arguments of every server that would have been started."""
    found = []

    class Started(Exception):
        pass

    def start(options, **place):
        found.append((options, place))
        raise Started

    monkeypatch.setattr(serve_module, "start_server", start)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    found.append(Started)
    return found


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "example.org"])
def test_serving_to_other_machines_needs_a_permission(folder, host, started, monkeypatch):
    with pytest.raises(ConfigError, match="can be reached from other machines, and vLLM's routes for weight updates ask for no key"):
        call(folder / "engine", host=host)
    assert len(started) == 1
    monkeypatch.setattr(serve_module, "check_port", lambda host, port: None)
    with pytest.raises(started[0]):
        call(folder / "engine", host=host, public=True)
    assert started[1][1]["host"] == host and started[1][1]["allow_public"]


def test_a_port_that_is_taken_or_none(folder, started):
    """Before vLLM is started, which would end in a traceback half a minute later."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: got {port}, which is in use on 127.0.0.1, expected a free one: end what listens there"):
            call(folder / "engine", port=port)
    for port in (0, -1, 65536):
        with pytest.raises(ConfigError, match=f"--port: got {port}, expected a port from 1 to 65535"):
            call(folder / "engine", port=port)
    with pytest.raises(ConfigError, match="which is not to be had on 203.0.113.7"):
        check_port("203.0.113.7", free_port())
    assert len(started) == 1


def test_a_run_directory_has_the_model_in_its_folder_engine(folder, started, tmp_path):
    with pytest.raises(ConfigError, match=f"MODEL_DIR: got {folder}, a run directory, expected a model's; try {folder}/engine"):
        call(folder)
    with pytest.raises(ConfigError, match="no config.json there, expected a folder in Hugging Face's format"):
        call(tmp_path)


@pytest.mark.parametrize("end", ["signal", "death"])
def test_one_line_when_it_is_ready_and_no_process_left(vllm, folder, tmp_path, end):
    fake = tmp_path / "vllm" / "entrypoints" / "openai"
    fake.mkdir(parents=True)
    for package in (tmp_path / "vllm", fake.parent, fake):
        (package / "__init__.py").touch()
    (fake / "api_server.py").write_text(SERVER)
    port, log = free_port(), tmp_path / "server.log"
    words = [sys.executable, "-m", "megatron_plugin.cli", "serve", str(folder / "engine"), "--port", str(port), "--log", str(log)]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    job = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first, ready = job.stdout.readline(), job.stdout.readline()
    assert first == f"starting vLLM on {folder / 'engine'} (log: {log})\n"
    assert ready.startswith("ready after ") and ready.endswith(f"s: rollout.engine=server rollout.url=http://127.0.0.1:{port} rollout.transfer=shm\n")
    children = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    assert children and "noise of vLLM" in log.read_text()
    if end == "signal":
        job.send_signal(signal.SIGTERM)
    else:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /die HTTP/1.0\r\n\r\n")
            connection.recv(100)
    out, err = job.communicate(timeout=30)
    assert out == "" and not any(_members(child) for child in children)
    assert job.returncode == (143 if end == "signal" else 5)
    assert end == "signal" or ("vLLM ended with exit code 7; the end of" in err and "out of memory" in err)


@pytest.mark.parametrize("own, asked, length", [(512, 0, 512), (512, 100, 100), (None, 0, 32768), (131072, 0, 32768), (131072, 40000, 40000)])
def test_the_context_is_the_models_own_where_none_is_asked_for(own, asked, length):
    assert context_length({"max_position_embeddings": own}, asked) == length


def test_a_context_longer_than_the_model_is_refused(folder):
    with pytest.raises(ConfigError, match="got a context of 9999 tokens, expected at most max_position_embeddings 512"):
        serve(str(folder / "engine"), host="127.0.0.1", port=1, public=False, dtype="fp32", memory=0.0, log="", options={"max_model_len": 9999})
