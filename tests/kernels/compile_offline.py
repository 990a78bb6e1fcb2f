"""Compile the launches that training makes, for GPUs that are not here, and print what the machine code holds as JSON.

    python tests/kernels/compile_offline.py          (a process of its own: the interpreter and the compiler cannot share one)
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_plugin.kernels import grad, stats
from megatron_plugin.kernels.layout import Shard, empty_like_rows

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (vocabulary, row stride, elements before the first row): Qwen's; GPT-2's odd one; odd in an aligned buffer; a slice that starts off a boundary
LAYOUTS = {"qwen": (151936, 151936, 0), "gpt2": (50257, 50257, 0), "odd_padded": (151937, 151944, 0), "slice": (50257, 50257, 3)}


class OfflineDriver:
    """Stands in for a GPU of one architecture, so that a launch specialises and compiles as it would there."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return dict(max_shared_mem=232448, multiprocessor_count=132, max_num_regs=65536, warpSize=32)

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, ty):
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)


def launches(dtype: torch.dtype, V: int, stride: int, lead: int):
    """Every kernel's launch on four rows of that layout: (name, call, elements per thread of its hot block)."""
    logits = torch.empty(lead + 4 * stride, dtype=dtype).as_strided((4, V), (stride, 1), lead)
    labels, rows, grads = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4), torch.zeros(4, 3)
    shard = Shard(vocab_start=0, vocab_size=V, ignore_index=-100, temperature=1.0)
    padded = Shard(vocab_start=0, vocab_size=V - 1, ignore_index=-100, temperature=1.0)
    elements = grad.BLOCK // (32 * grad.NUM_WARPS)
    yield "stats", stats.stats_call(logits, labels, shard)[0], stats.BLOCK // (32 * stats.NUM_WARPS)
    yield "grad", grad.grad_call(logits, empty_like_rows(logits), labels, rows, grads, shard), elements
    yield "grad_in_place", grad.grad_call(logits, logits, labels, rows, grads, shard), elements
    yield "grad_padded", grad.grad_call(logits, logits, labels, rows, grads, padded), elements


def _sass(cubin: bytes) -> tuple[list[tuple[int, str]], dict]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        run = lambda flag: subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = re.search(r"REG:(\d+) STACK:(\d+)", run("-res-usage"))
        text = run("-sass")
    code = [(int(a, 16), op.strip()) for a, op in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
    return code, dict(registers=int(usage[1]), stack=int(usage[2]))


def _hot_block(code: list[tuple[int, str]]) -> list[str]:
    """The longest loop, or where there is none the stretch that holds the 128-bit loads and stores."""
    loops = []
    for address, op in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", op)
        if target and int(target[1], 16) < address:
            loops.append([o for a, o in code if int(target[1], 16) <= a <= address])
    if loops:
        return max(loops, key=len)
    wide = [i for i, (_, op) in enumerate(code) if re.search(r"(LDG|STG)\.E[\w.]*\.128", op)]
    return [op for _, op in code[: wide[-1] + 1]] if wide else [op for _, op in code]


def facts(compiled, elements: int) -> dict:
    code, usage = _sass(compiled.asm["cubin"])
    hot = _hot_block(code)
    count = lambda pattern, ops: sum(bool(re.search(pattern, op)) for op in ops)  # noqa: E731
    everything = [op for _, op in code]
    return dict(
        usage, shared=compiled.metadata.shared,
        spills=count(r"\b(LDL|STL)\b", everything),
        hot_narrow_loads=count(r"LDG\.E\.(U16|S16|U8)|LDG\.E\b(?!\.\w)", hot),
        wide_loads=count(r"(LDG\.E[\w.]*|LDGSTS\.E[\w.]*)\.128", everything),
        wide_stores=count(r"STG\.E[\w.]*\.128", everything),
        instructions_per_element=round(len(hot) / elements, 2),
        exp2_per_element=round(count(r"MUFU\.EX2", hot) / elements, 2),
        keeps_nan=".NaN.f32" in compiled.asm["ptx"],
    )


def main() -> None:
    report = []
    for capability in (80, 90, 100):
        driver.set_active(OfflineDriver(capability))
        for dtype_name, dtype in DTYPES.items():
            for layout_name, layout in LAYOUTS.items():
                if capability != 90 and layout_name not in ("qwen", "gpt2"):
                    continue
                for kernel, call, elements in launches(dtype, *layout):
                    for cache in (stats.stats_kernel, grad.grad_kernel):
                        cache.device_caches.clear()  # the cache does not know that the stand-in architecture changed
                    row = dict(sm=capability, kernel=kernel, dtype=dtype_name, layout=layout_name)
                    report.append(row | facts(call.compile(), elements))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
