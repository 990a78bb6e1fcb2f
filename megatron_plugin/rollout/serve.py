"""`megatron-plugin serve`: a vLLM server that training jobs reach through rollout.engine=server, and that ends with this process."""

from __future__ import annotations

import errno
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_plugin.config import ConfigError, as_config_error
from megatron_plugin.rollout.engine import EngineLostError
from megatron_plugin.rollout.vllm_model import context_length, read_config
from megatron_plugin.rollout.vllm_process import EngineOptions, ServerProcess, server_command, server_environment, start_server
from megatron_plugin.rollout.vllm_versions import check_vllm

__all__ = ["ENGINE_DTYPES", "check_port", "engine_options", "serve"]

ENGINE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # ours -> vLLM's words


def engine_options(model_dir: str, *, dtype: str, memory: float, **options: Any) -> EngineOptions:
    """EngineOptions in the words of the configuration: dtype fp32 or bf16; memory the share of a GPU, or GiB of key-value cache on a CPU (0:
    0.5 of a GPU, 0.25 GiB); transfer None: nccl on GPUs, shm on a CPU; max_model_len 0: the model's own."""
    options["max_model_len"] = context_length(read_config(model_dir), options.get("max_model_len", 0))
    options["transfer"] = options.get("transfer") or ("nccl" if torch.cuda.is_available() else "shm")
    share = dict(gpu_memory_utilization=memory or 0.5, kv_cache_bytes=int((memory or 0.25) * 2**30))
    return EngineOptions(model_dir=model_dir, dtype=ENGINE_DTYPES[dtype], **share, **options)


def serve(
    model_dir: str, *, host: str, port: int, public: bool, dtype: str, memory: float, log: str, options: dict[str, Any]
) -> None:
    """Until a signal ends it.  One line when it can be used; what vLLM says goes to the file `log` ("": serve-PORT.log).

    ConfigError for a host that others reach without `public`, a port that is taken, and what no engine can be started with; EngineLostError when
    vLLM does not come up, or ends."""
    _check_folder(model_dir)
    with as_config_error("serve"):
        chosen = engine_options(model_dir, dtype=dtype, memory=memory, log=log or f"serve-{port}.log", **options)
        server_command(chosen, host, port, allow_public=public)
        server_environment(chosen)
        check_vllm()
    check_port(host, port)
    print(f"starting vLLM on {model_dir} (log: {chosen.log})", flush=True)
    signal.signal(signal.SIGTERM, _end)
    process = start_server(chosen, host=host, port=port, allow_public=public)
    try:
        print(f"ready after {process.start_s:.0f} s: rollout.engine=server rollout.url={process.url} rollout.transfer={chosen.transfer}", flush=True)
        while process.alive():
            process.cap_log()
            _wait(process)
        raise EngineLostError(f"vLLM ended with exit code {process.popen.returncode}; the end of {chosen.log}:\n{process.log_tail()}")
    finally:
        process.stop()


def check_port(host: str, port: int) -> None:
    """ConfigError unless a server can listen there."""
    if not 0 < port < 65536:
        raise ConfigError(f"got {port}, expected a port from 1 to 65535", "--port")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one that ended a moment ago is no hindrance
        try:
            probe.bind((host, port))
        except OSError as error:
            why = f"in use on {host}" if error.errno == errno.EADDRINUSE else f"not to be had on {host} ({error.strerror or error})"
            raise ConfigError(f"got {port}, which is {why}, expected a free one: end what listens there, or choose another port or --host", "--port") from error


def _check_folder(model_dir: str) -> None:
    inner = Path(model_dir) / "engine"
    if not (Path(model_dir) / "config.json").is_file() and (inner / "config.json").is_file():
        raise ConfigError(f"got {model_dir}, a run directory, expected a model's; try {inner}", "MODEL_DIR")


def _end(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # through the `finally` that ends the server


def _wait(process: ServerProcess) -> None:
    """A minute, or until it ends."""
    try:
        process.popen.wait(60)
    except subprocess.TimeoutExpired:
        pass
