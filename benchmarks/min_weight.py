"""What dropping nearly weightless rows from the two backward products saves, and the error it makes.

DFT weighs a token by p, CHORD-phi by p (1 - p): many rows weigh next to nothing.  `dropped` is the share of rows below the threshold, error
is the whole gradient's against the exact truth.  An entropy bonus gives every row a weight, so there is none here.
"""

from benchmarks import shapes
from benchmarks._ceilings import gemm_ceiling
from benchmarks._report import Report
from megatron_plugin.bench import ours_linear
from megatron_plugin.bench.cases import coefficients, linear_case
from megatron_plugin.bench.harness import Contender, Work

THRESHOLDS = (0.0, 1e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    report = Report("min_weight", __doc__)
    for shape in report.shapes(shapes.MIN_WEIGHT):
        case = linear_case(shape, report.device)
        contenders, dropped = [gemm_ceiling(shape)], {}
        for objective in ("dft", "chord_phi"):
            weight_T = coefficients(objective, case.truth["logp"], case.live)[0].abs()
            for threshold in THRESHOLDS:
                name = f"ours {objective} min_weight {threshold:g}"
                contenders.append(Contender(name, ours_linear.one_pass(objective, min_weight=threshold)))
                dropped[name] = float((weight_T < threshold).double().mean())
        rows = report.compare(case, contenders, Work(flops=shape.gemm_flops), refuse=False)
        for row in rows:
            row["dropped"] = dropped.get(row["contender"])
        report.save()


if __name__ == "__main__":
    main()
