"""Every shape and seed that is benchmarked, fixed before any tuning.  The held-out list is run too, and never looked at while tuning.

T tokens, H hidden, V columns of the vocabulary in one tensor (a shard of it under tensor parallelism).
"""

from dataclasses import replace

from megatron_plugin.bench.shape import ITEMSIZE, SEED, Shape

__all__ = ["CONFIGS", "ITEMSIZE", "SEED", "Shape"]

TOKENS, HIDDEN, VOCABULARIES = (8192, 4096, 32768), (4096, 8192), (151936, 131072, 262144, 32768)


def _held_out(*shapes: Shape) -> list[Shape]:
    return [replace(shape, held_out=True, seed=SEED + 1) for shape in shapes]


LOGITS = {  # T x V
    "cuda": [Shape(T, V, rivals=(T, V) == (8192, 151936)) for T in TOKENS for V in VOCABULARIES]
    + [Shape(4096, 151936, dtype="fp32", rivals=False)]
    + _held_out(
        Shape(8000, 128256, rivals=False), Shape(3001, 50257, rivals=False), Shape(2048, 129280, masked=0.4, rivals=False),
        Shape(1537, 200064, temperature=0.7, rivals=False), Shape(16384, 100352, rivals=False),
    ),
    "cpu": [Shape(512, 151936, dtype=d) for d in ("fp32", "bf16")] + [Shape(2048, 32768, dtype=d, rivals=False) for d in ("fp32", "bf16")]
    + _held_out(
        Shape(401, 100257, dtype="fp32", temperature=0.7, rivals=False), Shape(384, 129280, masked=0.4, rivals=False),
    ),
}  # fmt: skip

SHARDS = {  # T x V/8: what one of 8 tensor-parallel ranks holds
    "cuda": [Shape(T, V // 8, rivals=(T, V) == (8192, 151936)) for T in TOKENS for V in VOCABULARIES]
    + _held_out(Shape(6000, 128256 // 8, rivals=False), Shape(2048, 200064 // 8, rivals=False)),
    "cpu": [Shape(1024, 151936 // 8), Shape(1024, 151936 // 8, dtype="fp32")],
}

LINEAR = {  # T x H x V
    "cuda": [Shape(8192, V, 4096, rivals=V in (151936, 131072)) for V in VOCABULARIES]
    + [Shape(T, V, H, rivals=False) for T in TOKENS for H in HIDDEN for V in VOCABULARIES if (T, H) != (8192, 4096)]
    + _held_out(
        Shape(8192, 128256, 4096), Shape(6000, 129280, 5120, rivals=False), Shape(3072, 152064, 3584, masked=0.4, rivals=False),
        Shape(5000, 50257, 2048, rivals=False), Shape(8192, 151936 // 8, 8192, rivals=False),
    ),
    "cpu": [Shape(2048, 32768, 1024), Shape(2048, 32768, 1024, dtype="fp32", rivals=False)]
    + _held_out(Shape(2051, 50257, 512, rivals=False), Shape(2300, 16000, 384, dtype="fp32", masked=0.4, rivals=False)),
}  # fmt: skip

MIN_WEIGHT = CHUNK_SIZE = {"cuda": [Shape(8192, 151936, 4096)], "cpu": [Shape(2048, 32768, 1024)]}
TRAINING_STEP = {"cuda": [Shape(8192, 151936, 4096)], "cpu": [Shape(256, 32768, 256)]}
CONFIGS = {"cuda": [Shape(8192, 151936), Shape(8192, 131072), Shape(8192, 18992), Shape(8192, 262144), Shape(8192, 151936, dtype="fp32")], "cpu": []}

FIRST = 2
"""How many frozen shapes --quick runs, beside the first held-out one."""


def select(table: dict[str, list[Shape]], device: str, *, quick: bool = False, tiny: bool = False) -> list[Shape]:
    """The shapes of one run: those with all rivals first, then the held-out ones, so that a time budget cuts the largest of the rest.

    tiny: the same kinds of shape at sizes for testing the benchmark itself, never for numbers.
    """
    held_out = [s for s in table[device] if s.held_out]
    frozen = sorted((s for s in table[device] if not s.held_out), key=lambda s: not s.rivals)
    if tiny:
        some = frozen[:FIRST] + held_out[:1]
        return [replace(s, T=48 + s.T % 2 * 3, V=1000 + s.V % 8, H=128 if s.H else 0, rivals=i == 0) for i, s in enumerate(some)]
    if quick:
        return frozen[:FIRST] + held_out[:1]
    first = [s for s in frozen if s.rivals]
    return first + held_out + sorted(frozen[len(first) :], key=lambda s: s.T * s.V * max(s.H, 1))
