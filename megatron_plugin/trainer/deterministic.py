"""`deterministic: true`: what must be set so that a run has the same bits twice, and what is refused because nothing would make it so.

The list is Megatron-LM's for --deterministic-mode (training/arguments.py: fused cross-entropy, NCCL_ALGO, torch) with Transformer Engine's
(NVTE_ALLOW_NONDETERMINISTIC_ALGO, which its DotProductAttention asks for) and cuBLAS's (CUBLAS_WORKSPACE_CONFIG, without which torch raises at the first
GEMM).  Our own kernels have no floating-point atomics: tests/faults/determinism.py reads them.
"""

from __future__ import annotations

import os
from typing import NoReturn

import torch

from megatron_plugin.config import Config, ConfigError

__all__ = ["make_deterministic"]

ENVIRONMENT = {  # name -> what is accepted, the first is set where there is nothing
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),  # NVLS adds in the switch, in the order of arrival
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
FALSE = ("cross_entropy_loss_fusion", "tp_comm_overlap", "moe_permute_fusion")
"""Fields of TransformerConfig whose kernels add in the order of arrival, or are not known not to."""


def make_deterministic(config: Config) -> None:
    """Sets what the configuration asks for; call it before the process group and the model are made.  ConfigError for what would vary.

    Without `deterministic` nothing is set, and what an earlier run in this process set for torch is undone."""
    torch.use_deterministic_algorithms(config.deterministic and torch.cuda.is_available())
    if not config.deterministic:
        return
    for field in FALSE:
        if config.transformer.get(field):
            _refuse(config, f"model.{field}", "got true, expected false with deterministic=true: its kernels do not always add in one order")
    if config.rollout is not None:
        _refuse(config, "rollout", "got a section, expected none with deterministic=true: which completions an engine batches together, and so their last "
                                   "bits, depends on time; leave deterministic out")  # fmt: skip
    for name, accepted in ENVIRONMENT.items():
        value = os.environ.setdefault(name, accepted[0])
        if value not in accepted:
            raise ConfigError(f"got {name}={value} in the environment, expected {' or '.join(accepted)}, or nothing: then it is set", "deterministic",
                              config.sources.get("deterministic"))  # fmt: skip


def _refuse(config: Config, key: str, reason: str) -> NoReturn:
    raise ConfigError(reason, key, config.sources.get(key))
