"""What the chunk of the hidden-in loss costs in time and saves in memory: few tokens per chunk starve the products, many need room.

The default (Plan.chunk_tokens = None) stands beside fixed sizes and the three products at full T.
"""

from benchmarks import shapes
from benchmarks._ceilings import gemm_ceiling
from benchmarks._report import Report
from megatron_plugin.bench import ours_linear
from megatron_plugin.bench.cases import linear_case
from megatron_plugin.bench.harness import Contender, Work

CHUNKS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (512, 1024, 2048, 4096, 8192)}


def main() -> None:
    report = Report("chunk_size", __doc__)
    mine = [Contender("ours (default chunk)", ours_linear.one_pass("dft+entropy"))]
    mine += [Contender(f"ours, {tokens} tokens", ours_linear.one_pass("dft+entropy", chunk_tokens=tokens)) for tokens in CHUNKS[report.device]]
    for shape in report.shapes(shapes.CHUNK_SIZE):
        report.compare(linear_case(shape, report.device), [gemm_ceiling(shape), *mine], Work(flops=shape.gemm_flops))


if __name__ == "__main__":
    main()
