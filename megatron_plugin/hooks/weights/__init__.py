"""Weights between Hugging Face's safetensors and megatron-core's GPTModel, under any tensor x pipeline x virtual x data-parallel layout.

    fields = transformer_fields(read_hf_config("Qwen3-8B"))              # TransformerConfig and GPTModel fields that match config.json
    import_hf(chunks, "Qwen3-8B")                                        # every rank; reads only this rank's slices
    for name, tensor in hf_tensors(chunks, vocab_size=151_936): ...      # every rank; whole tensors, one parameter at a time
    export_hf(chunks, "out", like="Qwen3-8B")                            # every rank; rank 0 writes

Llama (2 and 3), Qwen2 and 2.5, Qwen3; tied or not.  Qwen3-MoE's names and slices are mapped, never run: no MoE layer of megatron-core runs on a CPU.
Public names are resolved on first use: what reads config.json imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # _HOME again, for type checkers and editors, which do not run __getattr__
    from megatron_plugin.hooks.weights.convert import export_hf as export_hf
    from megatron_plugin.hooks.weights.convert import hf_tensors as hf_tensors
    from megatron_plugin.hooks.weights.convert import import_hf as import_hf
    from megatron_plugin.hooks.weights.errors import WeightsError as WeightsError
    from megatron_plugin.hooks.weights.hf_config import ModelFields as ModelFields
    from megatron_plugin.hooks.weights.hf_config import hf_config_of as hf_config_of
    from megatron_plugin.hooks.weights.hf_config import read_hf_config as read_hf_config
    from megatron_plugin.hooks.weights.hf_config import transformer_fields as transformer_fields

_HOME = {
    "ModelFields": "hf_config",
    "WeightsError": "errors",
    "export_hf": "convert",
    "hf_config_of": "hf_config",
    "hf_tensors": "convert",
    "import_hf": "convert",
    "read_hf_config": "hf_config",
    "transformer_fields": "hf_config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_plugin.hooks.weights' has no attribute '{name}'; public names: {', '.join(__all__)}")
    return getattr(import_module(f"megatron_plugin.hooks.weights.{_HOME[name]}"), name)
