"""Compile the launches that training makes, for GPUs that are not here, and print what the machine code holds as JSON.

    python tests/kernels/compile_offline.py bf16 fp16     (a process of its own: the interpreter and the compiler cannot share one)
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_plugin.kernels import grad, loss, scale, stats, weighting
from megatron_plugin.kernels.layout import KernelCall, Shard, empty_like_rows
from megatron_plugin.kernels.objective import Objective, Twin

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


OBJECTIVES = {
    "idft": Twin(weighting.idft, (1.0, 0.1, 2.0, 1.0), metrics=1),
    "grpo": Twin(weighting.grpo, (0.2, 0.2, 3.0), metrics=2),
}
"""The longest weightings: one by statistics, one by inputs."""


def launches(dtype: torch.dtype, V: int, stride: int, lead: int):
    """Every kernel's launch on four rows of that layout: (name, call)."""
    T = 4
    logits = torch.empty(lead + T * stride, dtype=dtype).as_strided((T, V), (stride, 1), lead)
    labels, rows, grads = torch.zeros(T, dtype=torch.int64), torch.zeros(T, 4), torch.zeros(T, 3)
    shard = Shard(vocab_start=0, vocab_size=V, ignore_index=-100, temperature=1.0)
    padded = Shard(vocab_start=0, vocab_size=V - 1, ignore_index=-100, temperature=1.0)
    yield "stats", stats.stats_call(logits, labels, shard)[0]
    yield "grad", grad.grad_call(logits, empty_like_rows(logits), labels, rows, grads, shard)
    yield "grad_in_place", grad.grad_call(logits, logits, labels, rows, grads, shard)
    yield "grad_padded", grad.grad_call(logits, logits, labels, rows, grads, padded)
    if dtype == torch.float32 and stride % 8 == lead == 0:  # bf16 gradient of fp32 chunk logits
        narrow = torch.empty(T, stride, dtype=torch.bfloat16)[:, :V]
        yield "grad_narrowing", grad.grad_call(logits, narrow, labels, rows, grads, shard)
    yield "scale", scale.scale_call(logits, torch.ones(()))
    inputs = dict(coefficient=torch.ones(T), advantage=torch.ones(T), old_logp=torch.zeros(T, dtype=torch.bfloat16), expert=torch.ones(T) > 0)
    for name, twin in OBJECTIVES.items():
        objective = Objective(terms=None, inputs=inputs, grad_scale=torch.ones(()), z_loss=1e-4, twin=twin)
        yield f"loss_{name}", loss.loss_call(logits, logits, labels, shard, objective)[0]
    yield "loss_values", loss.loss_call(logits, None, labels, shard, objective)[0]
    partials = torch.zeros(8, T + 1, 4)[:, :-1]
    yield "loss_split", loss.loss_call(logits, logits, labels, shard, objective, partials)[0]


def _sass(cubin: bytes) -> tuple[list[tuple[int, str]], dict]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        run = lambda flag: subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = re.search(r"REG:(\d+) STACK:(\d+)", run("-res-usage"))
        text = run("-sass")
    code = [(int(a, 16), op.strip()) for a, op in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
    return code, dict(registers=int(usage[1]), stack=int(usage[2]))


def _loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The body of every loop."""
    bodies = []
    for address, op in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", op)
        if target and int(target[1], 16) < address:
            bodies.append([o for a, o in code if int(target[1], 16) <= a <= address])
    return bodies


def facts(call: KernelCall) -> dict:
    compiled = call.compile()
    elements = call.options["BLOCK"] // (32 * call.options["num_warps"])  # of a thread, per block
    code, usage = _sass(compiled.asm["cubin"])
    hot = [body for body in _loops(code) if any("MUFU.EX2" in op for op in body)] or _loops(code)
    count = lambda pattern, ops: sum(bool(re.search(pattern, op)) for op in ops)  # noqa: E731
    everything = [op for _, op in code]
    return dict(
        usage, shared=compiled.metadata.shared,
        spills=count(r"\b(LDL|STL)\b", everything),
        hot_loops=len(hot),
        hot_narrow_loads=sum(count(r"LDG\.E\.(U16|S16|U8)|LDG\.E\b(?!\.\w)", body) for body in hot),
        wide_loads=count(r"(LDG\.E[\w.]*|LDGSTS\.E[\w.]*)\.128", everything),
        wide_stores=count(r"STG\.E[\w.]*\.128", everything),
        instructions_per_element=[round(len(body) / elements, 2) for body in hot],
        exp2_per_element=[round(count(r"MUFU\.EX2", body) / elements, 2) for body in hot],
        keeps_nan=".NaN.f32" in compiled.asm["ptx"],
    )


def main(dtypes: list[str]) -> None:
    report = []
    for capability in (80, 90, 100):
        driver.set_active(OfflineDriver(capability))
        for dtype_name in dtypes:
            for layout_name, layout in LAYOUTS.items():
                if capability != 90 and layout_name != "gpt2":
                    continue
                for kernel, call in launches(DTYPES[dtype_name], *layout):
                    for cache in (stats.stats_kernel, grad.grad_kernel, loss.loss_kernel, scale.scale_kernel):
                        cache.device_caches.clear()  # the cache does not know that the stand-in architecture changed
                    row = dict(sm=capability, kernel=kernel, dtype=dtype_name, layout=layout_name)
                    report.append(row | facts(call))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
