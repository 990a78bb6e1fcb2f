"""A weighted loss with entropy, forward and backward, writes the gradient over the logits: two reads and one write.

Objective: DFT with an entropy bonus; contenders that know no entropy do less and are compared with their own truth.  Bytes: 3 x T x V x
itemsize.  `ours.token_loss` is what a training step calls; `ours.token_stats` is the form for any objective written in PyTorch.
"""

from benchmarks import rivals, shapes
from benchmarks._ceilings import memory_ceilings
from benchmarks._report import Report
from megatron_plugin.bench import ours
from megatron_plugin.bench.cases import logits_case
from megatron_plugin.bench.harness import Contender, Work


def main() -> None:
    report = Report("loss_forward_backward", __doc__)
    mine = [
        Contender("ours.token_loss", ours.one_pass("dft+entropy")),
        Contender("ours.token_loss chord_phi", ours.one_pass("chord_phi+entropy")),
        Contender("ours.token_stats", ours.two_pass("dft+entropy"), "two-pass, loss in PyTorch"),
    ]
    if report.device == "cuda":
        mine.append(Contender("ours.token_loss (cluster)", ours.one_pass("dft+entropy", "cluster"), "one read, one write"))
    for shape in report.shapes(shapes.LOGITS):
        work = Work(bytes=3 * shape.logits_bytes)
        report.compare(logits_case(shape, report.device), [*memory_ceilings(shape)[:1], *mine, *rivals.FORWARD_BACKWARD], work)


if __name__ == "__main__":
    main()
