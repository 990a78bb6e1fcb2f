"""Who can reach what is started: addresses are read off real sockets.  127.0.0.2 stands for another machine: it does not reach what listens on
127.0.0.1, and does reach what listens everywhere."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

from megatron_plugin import cli
from tests.faults.promises import Case

PROMISE = "servers listen on loopback, another address needs --public, pickle over HTTP is refused, and reward workers have no network and no keys"
ROOT = Path(__file__).parent.parent.parent
ELSEWHERE = ("0.0.0.0", "::", "", "10.0.0.7", "192.168.1.1", "0", "example.org", "127.0.0.1.example.org", "localhost.example.org", "[::]", "::ffff:0.0.0.0", "*")
FORBIDDEN = "VLLM_ALLOW_INSECURE_SERIALIZATION"
SECRET = "hunter2-canary"
FAKE_VLLM = """
import http.server, sys
value = lambda name: sys.argv[sys.argv.index(name) + 1]
print("trusts code" if [word for word in sys.argv if "trust" in word] else "trusts none", flush=True)
class Well(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer((value("--host"), int(value("--port"))), Well).serve_forever()
"""


def reached(port: int, host: str) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def model(folder: Path) -> Path:
    """What `serve` reads of a model before it starts anything."""
    (folder / "model").mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "head_dim": 32, "vocab_size": 300}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder / "model"


class StartedError(Exception):
    """In place of the server's start."""


def command(folder: Path, *arguments: str) -> tuple[int, list[str], dict[str, str], str]:
    """(exit code, command that would be started, its environment, stderr) of `megatron-plugin serve ...`."""
    ours = "megatron_plugin.rollout."
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(mock.patch("subprocess.Popen", side_effect=StartedError))
        for name in ("serve.check_vllm", "serve.check_port", "vllm_process.check_vllm"):  # vLLM need not be here, nor the address
            stack.enter_context(mock.patch(ours + name))
        stack.enter_context(mock.patch("signal.signal"))
        stack.enter_context(mock.patch.dict(os.environ)).pop("RANK", None)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        code = cli.main(["serve", str(folder / "model"), "--log", str(folder / "log"), *arguments])
    return (0, started.call_args[0][0], started.call_args[1]["env"], "") if started.called else (code, [], {}, said.getvalue())


def public(folder: Path) -> None:
    """Every address that another machine may reach is refused without --public, and taken with it."""
    model(folder)
    for host in ELSEWHERE:
        code, line, _, said = command(folder, "--host", host)
        assert code == 2 and not line and "can be reached from other machines" in said and "--public" in said, (host, said)
        code, line, _, said = command(folder, "--host", host, "--public")
        assert code == 0 and line[line.index("--host") + 1] == host, (host, said)
    for host in ((), ("--host", "127.0.0.1"), ("--host", "localhost"), ("--host", "::1"), ("--host", "127.1.2.3")):
        code, line, environment, said = command(folder, *host)
        assert code == 0 and line[line.index("--host") + 1] == (host[1] if host else "127.0.0.1"), said
        assert FORBIDDEN not in environment and not [word for word in line if "trust" in word]


def insecure(folder: Path) -> None:
    """The variable with which vLLM unpickles what comes over HTTP, whatever its value."""
    model(folder)
    for value in ("1", "0", ""):
        with mock.patch.dict(os.environ, {FORBIDDEN: value}):
            code, line, _, said = command(folder)
        assert code == 2 and not line and FORBIDDEN in said


def listens(folder: Path, *, options: tuple[str, ...], everywhere: bool) -> None:
    """The real command, with a stand-in for vLLM's server that listens where it is told to."""
    fake = folder / "fake" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    fake.parent.mkdir(parents=True)
    for package in list(fake.parents)[:3]:
        (package / "__init__.py").touch()  # or the real vllm, a package with one, would come first
    fake.write_text(FAKE_VLLM)
    port, log = free_port(), folder / "log"
    script = """
import sys
from unittest import mock
from megatron_plugin import cli
with mock.patch("megatron_plugin.rollout.vllm_process.check_vllm"), mock.patch("megatron_plugin.rollout.serve.check_vllm"):
    sys.exit(cli.main(sys.argv[1:]))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", FORBIDDEN)}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "fake"), str(ROOT)])
    line = [sys.executable, "-c", script, "serve", str(model(folder)), "--port", str(port), "--log", str(log), *options]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as server:
        try:
            said = [server.stdout.readline() for _ in range(2)]
            assert said[1].startswith("ready") and "trusts none" in log.read_text(), (said, log.read_text())
            assert reached(port, "127.0.0.1") and reached(port, "127.0.0.2") is everywhere
        finally:
            server.terminate()  # it ends what it has started


def transports(folder: Path) -> None:
    """What listens for engines during a transfer of weights."""
    from megatron_plugin.config.rollout import RolloutConfig
    from megatron_plugin.rollout.transports.gloo import Gloo, listen

    assert RolloutConfig().bind == Gloo().bind == "127.0.0.1"
    with listen(Gloo().bind) as listener:
        port = listener.getsockname()[1]
        assert reached(port, "127.0.0.1") and not reached(port, "127.0.0.2")
    with socket.create_server(("0.0.0.0", 0)) as control:
        assert reached(control.getsockname()[1], "127.0.0.2"), "nothing here can tell the difference"
    for address in ("0.0.0.0", "::", ""):
        try:
            listen(address).close()
            raise AssertionError(f"listens on {address!r}")
        except ValueError as error:
            assert "expected" in str(error)


def reward_network(folder: Path) -> None:
    """A judge finds no network, and a judge of ours no secrets; with rollout.reward_network the same function finds it."""
    from megatron_plugin.rollout.worker_pool import Workers

    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    task = {"kind": "user", "path": "tests.rollout.user_rewards.connects"}
    with listener:
        for network in (False, True):
            with Workers(task, timeout_s=20, memory_mb=512, network=network) as workers:
                (verdict,) = workers.judge([{"prompt": "", "completion": address, "reference": None, "finish_reason": "stop"}])
            assert (verdict.cause == "scored") is network, verdict
            assert network or "rollout.reward_network" in verdict.detail
            try:
                listener.accept()[0].close()
                assert network, "a reward worker has connected"
            except TimeoutError:
                assert not network
    with mock.patch.dict(os.environ, SECRET_KEY=SECRET):
        for kind, hidden in ((task, False), ({"kind": "format", "pattern": "a", "full": False}, True)):
            with Workers(kind, timeout_s=20, memory_mb=512) as workers:
                workers.start()
                environment = Path(f"/proc/{workers._workers[0].process.pid}/environ").read_bytes()
            assert (SECRET.encode() not in environment) is hidden, kind


def cases(*, full: bool) -> list[Case]:
    quick = [
        Case("public addresses", public, tries=2 * len(ELSEWHERE) + 5),
        Case("pickle over HTTP", insecure, tries=3),
        Case("weight transfer", transports, tries=4),
        Case("reward network", reward_network, tries=2),
    ]
    if not full:
        return quick
    return [*quick, Case("listens on loopback", partial(listens, options=(), everywhere=False)),
            Case("listens everywhere when told to", partial(listens, options=("--host", "0.0.0.0", "--public"), everywhere=True))]  # fmt: skip
