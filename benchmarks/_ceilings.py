"""What the machine can do at best, as contenders: timed in the same rounds as everyone else, on the same memory."""

import torch

from megatron_plugin.bench.harness import Contender, NotMeasured, Run, Work


def _streams(function) -> Run:
    """A run without outputs."""

    def call(_):
        function()
        return {}

    return Run(call)


def _copy(case) -> Run:
    source, target = case.original, torch.empty_like(case.original)
    return _streams(lambda: target.copy_(source))


def _read_max(case) -> Run:
    flat = case.original.view(-1)
    words = flat[: flat.numel() // 2 * 2].view(torch.int32)
    return _streams(words.amax)


def _read_dot(case) -> Run:
    if case.dtype != torch.float32:
        raise NotMeasured("a bf16 dot product computes, it does not stream")
    half = case.original.numel() // 2
    first, second = case.original.view(-1)[:half], case.original.view(-1)[half : 2 * half]
    return _streams(lambda: torch.dot(first, second))


def memory_ceilings(shape) -> list[Contender]:
    """Device copy (bytes read plus bytes written) and read-only streams of the logits."""
    size = shape.logits_bytes
    return [
        Contender("ceiling.copy", _copy, "copy of the logits, reads + writes", work=Work(2 * size)),
        Contender("ceiling.read.max", _read_max, "largest 32-bit word of the logits, reads only", work=Work(size)),
        Contender("ceiling.read.dot", _read_dot, "dot product of the two halves, reads only", work=Work(size)),
    ]


def _gemms(case) -> Run:
    hidden, weight = case.hidden, case.weight
    wide = {"out_dtype": torch.float32} if case.device.type == "cuda" and case.dtype != torch.float32 else {}

    def products():
        logits = torch.mm(hidden, weight.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden, **wide)

    return _streams(products)


def gemm_ceiling(shape) -> Contender:
    """The three matrix products of a head at full T, nothing between them: logits, dX, dW (fp32 output for bf16 on a GPU)."""
    return Contender("ceiling.gemm", _gemms, "3 x torch.mm at full T, no loss at all", work=Work(flops=shape.gemm_flops))
