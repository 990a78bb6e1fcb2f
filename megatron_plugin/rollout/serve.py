"""`megatron-plugin serve`: this process becomes a vLLM server that training jobs reach through rollout.engine=server."""

from __future__ import annotations

import os
from typing import Any

import torch

from megatron_plugin.config import as_config_error
from megatron_plugin.rollout.vllm_process import EngineOptions, server_command, server_environment
from megatron_plugin.rollout.vllm_versions import check_vllm

__all__ = ["ENGINE_DTYPES", "engine_options", "serve"]

ENGINE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # ours -> vLLM's words


def engine_options(model_dir: str, *, dtype: str, memory: float, **options: Any) -> EngineOptions:
    """EngineOptions in the words of the configuration: dtype fp32 or bf16; memory the share of a GPU, or GiB of key-value cache on a CPU (0:
    0.5 of a GPU, 0.25 GiB); transfer None: nccl on GPUs, shm on a CPU."""
    options["transfer"] = options.get("transfer") or ("nccl" if torch.cuda.is_available() else "shm")
    share = dict(gpu_memory_utilization=memory or 0.5, kv_cache_bytes=int((memory or 0.25) * 2**30))
    return EngineOptions(model_dir=model_dir, dtype=ENGINE_DTYPES[dtype], **share, **options)


def serve(model_dir: str, *, host: str, port: int, public: bool, dtype: str, memory: float, options: dict[str, Any]) -> None:
    """Does not return.  ConfigError for a host that others reach without `public`, and for what no engine can be started with."""
    with as_config_error("serve"):
        chosen = engine_options(model_dir, dtype=dtype, memory=memory, **options)
        command, environment = server_command(chosen, host, port, allow_public=public), server_environment(chosen)
        check_vllm()
    print(f"rollout.engine=server rollout.url=http://{host}:{port} rollout.transfer={chosen.transfer}", flush=True)
    os.execve(command[0], command, environment)
