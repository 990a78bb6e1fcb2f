"""A loss that runs out of memory in a step of a run: for real on a CPU, in the words of a GPU."""

import torch

from megatron_plugin.losses.contract import TokenTerms

HOW = "host"
FAILS_IN = 2
step = 0
"""That is under way; the test counts."""


def greedy(stats, inputs) -> TokenTerms:
    """Plain NLL until then."""
    if step >= FAILS_IN:
        if HOW == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB")
        torch.empty(1 << 55, dtype=torch.uint8)
    return TokenTerms(loss=-stats.logp)
