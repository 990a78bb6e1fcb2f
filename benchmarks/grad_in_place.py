"""The backward alone reads the logits once and writes the gradient over them.

Bytes: 2 x T x V x itemsize.  Statistics are already known, for ours and for the compiled formula alike; both form the label's column in fp32.
"""

from benchmarks import rivals, shapes
from benchmarks._ceilings import memory_ceilings
from benchmarks._report import Report
from megatron_plugin.bench import ours
from megatron_plugin.bench.cases import logits_case
from megatron_plugin.bench.harness import Contender, Work


def main() -> None:
    report = Report("grad_in_place", __doc__)
    mine = [Contender("ours", ours.grad_in_place("dft+entropy"))]
    for shape in report.shapes(shapes.LOGITS):
        work = Work(bytes=2 * shape.logits_bytes)
        report.compare(logits_case(shape, report.device), [*memory_ceilings(shape)[:1], *mine, *rivals.GRADIENT], work)


if __name__ == "__main__":
    main()
