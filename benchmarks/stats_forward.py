"""token_stats reads the logits once, at the speed of memory, and returns log-probability, entropy and log-partition.

Bytes: T x V x itemsize, read once.  Against PyTorch's expressions, compiled and not, and against streams that do nothing but read.
"""

from benchmarks import rivals, shapes
from benchmarks._ceilings import memory_ceilings
from benchmarks._report import Report
from megatron_plugin.bench import ours
from megatron_plugin.bench.cases import logits_case
from megatron_plugin.bench.harness import Contender, Work


def main() -> None:
    report = Report("stats_forward", __doc__)
    mine = [Contender("ours", ours.stats())]
    mine += [Contender("ours (eager)", ours.stats("eager"), "where no compiler is found")] * (report.device == "cpu")
    for shape in report.shapes(shapes.LOGITS):
        work = Work(bytes=shape.logits_bytes)
        report.compare(logits_case(shape, report.device), [*memory_ceilings(shape), *mine, *rivals.STATS], work)


if __name__ == "__main__":
    main()
