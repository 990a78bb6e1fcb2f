"""Which tensors a full set of weights has: names and shapes of a Hugging Face checkpoint, from the model's configuration alone."""

from __future__ import annotations

from typing import Any

__all__ = ["ExpectedWeights"]

SHOWN = 5  # names in a message: enough to see the pattern


class ExpectedWeights:
    """What an engine of one model must be sent in each update, and what it has been sent so far.

    Models whose checkpoints are laid out otherwise than transformers' modules (it converts them while loading: mixtures of experts) are not
    known here: `shapes` is None, only doubles are found, and whether all came is left to the caller."""

    def __init__(self, config: Any, dtype: str):
        """`config`: transformers' configuration.  `dtype`: of the engine's weights, such as "bfloat16"."""
        self.dtype = dtype
        self.shapes, self.optional = _shapes(config)
        self.seen: set[str] = set()

    def check(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        """Refuse a bucket before any of it is loaded: ValueError that names the first tensor that is unknown, came before, or has another shape or dtype."""
        for i, (name, dtype, shape) in enumerate(zip(names, dtypes, shapes, strict=True)):
            if name in self.seen or name in names[:i]:
                raise ValueError(f"weights do not fit the served model: {name} came twice in one update, expected each tensor once")
            if dtype != self.dtype:
                raise ValueError(
                    f"weights do not fit the served model: {name}: got {dtype}, expected {self.dtype}: cast before sending, or start the engine with the trainer's dtype"
                )
            if self.shapes is None:
                continue
            if name not in self.shapes:
                raise ValueError(
                    f"weights do not fit the served model: got an unexpected tensor {name}, expected Hugging Face's names such as {_some(self.shapes)}"
                )
            if tuple(shape) != self.shapes[name]:
                raise ValueError(
                    f"weights do not fit the served model: {name}: got a shape of {tuple(shape)}, expected {self.shapes[name]}: is it the same model and vocabulary?"
                )
        self.seen.update(names)

    def missing(self) -> list[str]:
        """Names that have not come since `restart`; empty when they are not known."""
        return [name for name in self.shapes or () if name not in self.seen and name not in self.optional]

    def restart(self) -> None:
        """A new update begins."""
        self.seen = set()


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _shapes(config: Any) -> tuple[dict[str, tuple[int, ...]] | None, set[str]]:
    """({name: shape}, names that may be left out because they are tied); (None, empty) where transformers does not know."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError):  # a model of vLLM's own, or with code from outside
        return None, set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if any("experts" in name for name in shapes):
        return None, set()
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if getattr(config, "tie_word_embeddings", False) else set()
    return shapes, tied
