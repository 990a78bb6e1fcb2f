"""One size that is measured.  T tokens, H hidden, V columns of the vocabulary in one tensor (a shard of it under tensor parallelism)."""

from dataclasses import dataclass

SEED = 20261121
ITEMSIZE = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Shape:
    T: int
    V: int
    H: int = 0
    dtype: str = "bf16"
    temperature: float = 1.0
    masked: float = 0.0
    """Share of rows labelled ignore_index."""
    held_out: bool = False
    rivals: bool = True
    """All contenders; False where those that compile or tune for seconds (hidden-in: all rivals) are left out."""
    seed: int = SEED

    @property
    def logits_bytes(self) -> int:
        return self.T * self.V * ITEMSIZE[self.dtype]

    @property
    def gemm_flops(self) -> int:
        """Of the three products of a head: logits, dX, dW."""
        return 6 * self.T * self.H * self.V

    def __str__(self) -> str:
        size = "x".join(str(n) for n in (self.T, self.H, self.V) if n)
        extra = [f"temperature {self.temperature}"] * (self.temperature != 1) + [f"{self.masked:.0%} masked"] * (self.masked > 0)
        return " ".join([size, self.dtype, *extra])
