"""From hidden states to loss, dX and dW in the time of three matrix products, without a [tokens, vocabulary] tensor.

One-pass (`ours.linear_token_loss`): 6 THV operations, gradient formed in the forward.  Two-pass (`ours.linear_token_stats`): 8 THV, any
objective.  Rates count 6 THV for everyone.  Peak memory is what a call allocates beyond hidden and weight, its gradients included.
"""

from benchmarks import rivals_linear, shapes
from benchmarks._ceilings import gemm_ceiling
from benchmarks._report import Report
from megatron_plugin.bench import ours_linear
from megatron_plugin.bench.cases import linear_case
from megatron_plugin.bench.harness import MIB, Work


def main() -> None:
    report = Report("linear_loss", __doc__)
    for shape in report.shapes(shapes.LINEAR):
        contenders = [gemm_ceiling(shape), *ours_linear.contenders(shape, report.device), *(rivals_linear.LINEAR if shape.rivals else [])]
        rows = report.compare(linear_case(shape, report.device), contenders, Work(flops=shape.gemm_flops))
        for row in rows:
            if row["contender"] == "ours.linear_token_loss main_grad":
                row["allowed_mib"] = ours_linear.chunk_and_d_hidden(shape, report.device) / MIB
        report.save()


if __name__ == "__main__":
    main()
