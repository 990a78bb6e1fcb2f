"""Megatron-Bridge, used instead of our own conversion where it is importable and knows the model's names.

Its maps (0.3.1) have Transformer Engine's names of the norms.  Of a Qwen2 or Qwen3 in megatron-core's local spec it leaves the norms out with a
warning (model_bridge.py, "No mapping found"), so there our own conversion stays.

Never run here: Megatron-Bridge imports Transformer Engine, which no CPU has.  The calls are those of Megatron-Bridge 0.3.1
(megatron/bridge/models/conversion/auto_bridge.py); tests show only that the choice is made and the arguments arrive.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from megatron_plugin.hooks.weights.errors import WeightsError

__all__ = ["Backend", "bridge_for"]

Backend = Literal["auto", "own", "bridge"]


def bridge_for(hf_dir: str | Path | None, backend: Backend, *, local_names: bool) -> Any | None:
    """An AutoBridge for the model in `hf_dir`; None where our own conversion is to be used.

    auto: Megatron-Bridge if it imports, the model does not have the local spec's names, and there is a directory to tell it the architecture.
    WeightsError when it was asked for and cannot be used."""
    if backend not in ("auto", "own", "bridge"):
        raise WeightsError(f"got backend {backend!r}, expected auto, own or bridge")
    if backend == "own" or (backend == "auto" and (hf_dir is None or local_names)):
        return None
    try:
        auto_bridge = import_module("megatron.bridge").AutoBridge
    except Exception as error:  # its imports reach Transformer Engine, whose empty meta package raises RuntimeError
        if backend == "bridge":
            raise WeightsError(f"got backend 'bridge', but megatron.bridge does not import ({error}); install it, or take backend 'own'") from error
        return None
    if hf_dir is None or local_names:
        got = "without a Hugging Face directory" if hf_dir is None else "for layers of megatron-core's local spec, whose norms it would leave out"
        raise WeightsError(f"got backend 'bridge' {got}; expected a directory and Transformer Engine's layers, or backend 'own'")
    return auto_bridge.from_hf_pretrained(str(hf_dir))
