"""The kernel part of one of eight tensor-parallel ranks: its eighth of the vocabulary, forward and backward, without the all-gather.

No single GPU can time a collective, so none is: the shard stands for a vocabulary of its own, and the partials of seven empty ranks are put
beside its own where the all-gather would bring them.  Here launches weigh, not bytes.
"""

import torch

from benchmarks import rivals, shapes
from benchmarks._ceilings import memory_ceilings
from benchmarks._report import Report
from benchmarks._rival_tools import in_place
from megatron_plugin.bench.cases import IGNORE, LogitsCase, logits_case, objective_sum
from megatron_plugin.bench.harness import Contender, Run, Work
from megatron_plugin.bench.ours import bound

RANKS = 8
PARALLEL = ("eager", "mcore.unfused", "mcore.fused", "mcore+entropy", "liger.vocab_parallel", "te")
OBJECTIVE = "dft+entropy"


def _beside_empty_ranks(case: LogitsCase):
    """What an op calls between its two passes: [T, 4] partials -> [RANKS, T, 4], here from memory."""
    empty = torch.tensor([-1e30, 0.0, 0.0, -torch.inf], device=case.device).expand(RANKS - 1, case.shape.T, 4)
    return lambda partials_T4: torch.cat((partials_T4[None], empty))


def _outputs(loss, logits) -> dict:
    return {f"loss:{OBJECTIVE}": loss, f"dlogits:{OBJECTIVE}": torch.autograd.grad(loss, logits)[0]}


def token_loss(case: LogitsCase) -> Run:
    from megatron_plugin import TokenInputs
    from megatron_plugin.kernels.layout import Shard
    from megatron_plugin.kernels.token_loss import token_loss_table
    from megatron_plugin.losses.objective import objective_of

    shard, gather = Shard(0, case.shape.V, IGNORE, case.shape.temperature), _beside_empty_ranks(case)
    loss = bound(OBJECTIVE).for_vocabulary(case.shape.V)

    def call(logits):
        objective, _ = objective_of(loss, TokenInputs())
        return _outputs(token_loss_table(logits, case.labels, shard, objective, gather=gather, overwrite_logits=True)[0], logits)

    return Run(call, in_place(case))


def token_stats(case: LogitsCase) -> Run:
    from megatron_plugin.kernels.layout import Shard
    from megatron_plugin.kernels.token_stats import token_stats as shard_token_stats

    shard, gather = Shard(0, case.shape.V, IGNORE, case.shape.temperature), _beside_empty_ranks(case)

    def call(logits):
        stats = shard_token_stats(logits, case.labels, shard, gather=gather, overwrite_logits=True)
        return _outputs(objective_sum(OBJECTIVE, stats.logp, stats.entropy, case.live), logits)

    return Run(call, in_place(case))


def main() -> None:
    report = Report("tensor_parallel", __doc__)
    mine = [
        Contender("ours.token_loss", token_loss, "two launches around the gather"),
        Contender("ours.token_stats", token_stats, "two-pass, loss in PyTorch"),
    ]
    theirs = [rival for rival in rivals.FORWARD_BACKWARD if rival.name in PARALLEL]
    for shape in report.shapes(shapes.SHARDS):
        work = Work(bytes=3 * shape.logits_bytes)
        report.compare(logits_case(shape, report.device), [*memory_ceilings(shape)[:1], *mine, *theirs], work)


if __name__ == "__main__":
    main()
