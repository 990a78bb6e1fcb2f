"""How well a step used the machine: perf/mfu and perf/memory_gib.  What is not known is left out.

    perf/mfu = operations of the model / (seconds of the trainer's part of the step x ranks x peak of a device)

On-policy the trainer's part is perf/train_s: waiting for engines says nothing about the trainer.  Supervised it is the step.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_plugin.trainer.flops import GPTSizes

__all__ = ["Utilisation", "memory_gib", "peak_flops"]

GIB = 2**30
PEAKS = (  # name in torch.cuda.get_device_name, upper case -> dense TFLOP/s: bf16 tensor cores, TF32, fp32; NVIDIA's data sheets, without sparsity
    ("H100 PCIE", 756.0, 378.0, 51.2), ("H100 NVL", 835.5, 417.5, 60.0), ("H200 NVL", 835.5, 417.5, 60.0), ("H100", 989.4, 494.7, 66.9),
    ("H200", 989.4, 494.7, 66.9), ("GH200", 989.4, 494.7, 66.9), ("GB200", 2500.0, 1250.0, 80.0), ("B200", 2250.0, 1125.0, 75.0), ("A100", 312.0, 156.0, 19.5),
)  # fmt: skip


def peak_flops(device: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """FLOP/s of one GPU of that name for matrix products of `dtype`, by its vendor; None for a device or type that is not in the table."""
    name = device.upper()
    row = None if "MIG" in name else next((peaks for part, *peaks in PEAKS if part in name), None)  # a part of a GPU has a part of its peak
    column = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1 if tf32 else 2}.get(dtype)
    return None if row is None or column is None else row[column] * 1e12


def memory_gib() -> float:
    """GiB: the most that this process has had allocated on its GPU, or the most of the host's memory it was ever in."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    try:  # ru_maxrss begins with what the process that started this one had
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIB
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


class Utilisation:
    """Of one run: its sizes and the peak of its devices, looked up once."""

    def __init__(self, model_config, *, vocabulary: int, length: int, peak_tflops: float):
        """model_config: the TransformerConfig of the run.  peak_tflops: of one device; 0: by its name."""
        self.sizes, self.length = GPTSizes.of(model_config, vocabulary), length
        self.peak = peak_tflops * 1e12 or None
        if self.peak is None and torch.cuda.is_available() and not getattr(model_config, "fp8", None):  # fp8's products have another peak than the rest
            tf32 = torch.get_float32_matmul_precision() != "highest"
            self.peak = peak_flops(torch.cuda.get_device_name(), model_config.params_dtype, tf32=tf32)

    def mfu(self, *, tokens: float, head_tokens: float, seconds: float) -> dict[str, float]:
        """{"perf/mfu": share in [0, 1]}, {} where sizes or peak are not known.  `tokens` and `head_tokens` of the step, over all ranks."""
        if self.sizes is None or self.peak is None or seconds <= 0:
            return {}
        done = self.sizes.step(tokens=tokens, length=self.length, head_tokens=head_tokens)
        return {"perf/mfu": done / (seconds * dist.get_world_size() * self.peak)}
