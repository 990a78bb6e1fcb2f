"""IDFT costs what DFT costs: the hidden-in one-pass op, forward and backward, time and peak memory of both in turn.

    python -m benchmarks.idft_cost                # CPU; a [T, V] tensor more, as the released trainer has several, would show at once

Time: median over interleaved rounds of process CPU time, which a busy machine changes less than the wall clock.  Memory: growth of the
resident high-water mark over one call, in a process of its own for each loss.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_plugin import bind, linear_token_loss

T, H, V = 2048, 512, 32_000
ROUNDS = 15
LOSSES = ("dft", "idft")


def _bound(name: str):
    return bind(name, **({"ramp": torch.tensor(0.5)} if name == "idft" else {}))


def _problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=g) / H**0.5
    return torch.randn(T, H, generator=g), weight.requires_grad_(), torch.randint(V, (T,), generator=g)


def _call(loss, hidden, weight, labels) -> None:
    weight.grad = None
    linear_token_loss(hidden.detach().requires_grad_(), weight, labels, loss).loss_sum.backward()


def _times() -> dict[str, float]:
    """Seconds of CPU."""
    problem, losses, found = _problem(), {name: _bound(name) for name in LOSSES}, {name: [] for name in LOSSES}
    for loss in losses.values():
        _call(loss, *problem)
    for turn in range(ROUNDS):
        for name in LOSSES if turn % 2 else reversed(LOSSES):
            begin = time.process_time()
            _call(losses[name], *problem)
            found[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def _status(key: str) -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)).split()[1]) * 1024


def _peak(name: str) -> float:
    """MiB beyond what was there before the call, the returned gradients among them."""
    problem, loss = _problem(), _bound(name)
    _call(loss, problem[0][:64], problem[1], problem[2][:64])  # libraries and thread pools
    problem[1].grad = None
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    _call(loss, *problem)
    return (_status("VmHWM") - before) / 2**20


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(_peak(sys.argv[1])))
        return
    seconds = _times()
    peaks = {}
    for name in LOSSES:
        done = subprocess.run([sys.executable, "-m", "benchmarks.idft_cost", name], capture_output=True, text=True, check=True, timeout=300)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"fp32, T={T} H={H} V={V}, {torch.get_num_threads()} thread(s), {ROUNDS} rounds; one [T, V] tensor is {T * V * 4 / 2**20:.0f} MiB")
    for name in LOSSES:
        print(f"{name:<6} {seconds[name]:.3f} s CPU ({seconds[name] / seconds['dft'] - 1:+.1%})   peak {peaks[name]:.0f} MiB ({peaks[name] / peaks['dft'] - 1:+.1%})")


if __name__ == "__main__":
    main()
