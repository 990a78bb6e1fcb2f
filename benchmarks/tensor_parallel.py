"""The kernel part of one of eight tensor-parallel ranks: its eighth of the vocabulary, forward and backward, without the all-gather.

No single GPU can time a collective, so none is: the shard stands for a vocabulary of its own.  Here launches weigh, not bytes.
"""

from benchmarks import ours, rivals, shapes
from benchmarks._ceilings import memory_ceilings
from benchmarks._harness import Contender, Work
from benchmarks._report import Report
from benchmarks.cases import logits_case

PARALLEL = ("eager", "mcore.unfused", "mcore.fused", "mcore+entropy", "liger.vocab_parallel", "te")


def main() -> None:
    report = Report("tensor_parallel", __doc__)
    mine = [
        Contender("ours.token_loss", ours.one_pass("dft+entropy"), "one launch, as on one rank"),
        Contender("ours.token_stats", ours.two_pass("dft+entropy"), "two launches, as around an all-gather"),
    ]
    theirs = [rival for rival in rivals.FORWARD_BACKWARD if rival.name in PARALLEL]
    for shape in report.shapes(shapes.SHARDS):
        work = Work(bytes=3 * shape.logits_bytes)
        report.compare(logits_case(shape, report.device), [*memory_ceilings(shape)[:1], *mine, *theirs], work)


if __name__ == "__main__":
    main()
