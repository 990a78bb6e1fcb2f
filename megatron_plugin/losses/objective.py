"""A token-local loss as the one-pass ops see it: PyTorch terms with their derivatives, and the twin where there is one.  T: tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_plugin.kernels.objective import COLUMNS, MAX_PARAMS, Number, Objective, Twin
from megatron_plugin.losses.algebra import is_neutral
from megatron_plugin.losses.contract import TermsError, TokenInputs, TokenLoss, TokenStats, TokenTerms
from megatron_plugin.losses.probe import own_metrics, saving_as_it_is
from megatron_plugin.losses.reduction import masked_terms, term_table
from megatron_plugin.losses.regularisers import REGULARISERS

__all__ = ["objective_of", "resolve_twin"]


def objective_of(loss: TokenLoss, inputs: TokenInputs, *, grad_scale: Number = 1.0) -> tuple[Objective, tuple[str, ...]]:
    """The objective of `loss` on these tokens ([T] inputs), and the names of its own metrics.

    ValueError when the loss needs an input that is missing: found out here, since a twin would run without; and where a parameter requires a
    gradient, which a one-pass op would lose.
    """
    _check_constants(loss)
    metrics = own_metrics(loss, frozenset(inputs.tensors()))

    def called(stats: TokenStats, given: TokenInputs, live: Tensor) -> tuple[TokenTerms, TokenInputs]:
        found, masked = masked_terms(loss, stats, given, live)
        if (names := tuple(name for name in found.metrics if name not in REGULARISERS)) != metrics:
            raise TermsError(f"loss '{loss.name}' reported metrics {names}, expected {metrics} as at its first call: report the same at every call")
        return found, masked

    def terms(stats: TokenStats, live: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        plain = {name: x for name, x in given.items() if not name.startswith("extra.")}
        extra = {name.removeprefix("extra."): x for name, x in given.items() if name.startswith("extra.")}
        token_inputs = TokenInputs(**plain, extra=extra)
        if torch.is_inference_mode_enabled():  # nothing can be differentiated there, nobody asks for a gradient
            found, masked = called(stats, token_inputs, live)
            return term_table(stats, found, masked, live)[0], torch.zeros_like(stats.logp)[:, None].expand(-1, 3)
        with torch.enable_grad(), saving_as_it_is():
            leaves = TokenStats(*(torch.where(live, x, 0.0).detach().requires_grad_() for x in stats))
            found, masked = called(leaves, token_inputs, live)
            table_CT, weighted_T = term_table(leaves, found, masked, live)
            slopes = torch.autograd.grad(weighted_T.sum(), leaves, allow_unused=True, materialize_grads=True)
        a_T, b_T, c_T = slopes
        a_T = torch.where(stats.logp.isnan(), stats.logp, a_T)  # the derivative of a clip is 0 at NaN, which would hide a stray label
        grads_T3 = torch.where(live[:, None], torch.stack((a_T, b_T, c_T), -1), 0.0)  # NaN inputs of a masked token leave NaN derivatives
        table_CT[COLUMNS.index("reach")] = grads_T3.abs().amax(-1)
        return table_CT, grads_T3

    function = None if inputs.extra else resolve_twin(loss)  # extra inputs have no place in the twin ABI: PyTorch terms then
    twin = None if function is None else Twin(function, _twin_params(loss), len(metrics))
    regularisers = {name: loss.regularisers.get(name, 0.0) for name in REGULARISERS}
    return Objective(terms, inputs.tensors(), grad_scale, twin=twin, **regularisers), metrics


def _check_constants(loss: TokenLoss) -> None:
    for name, value in {**loss.params, **loss.regularisers}.items():
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"loss '{loss.name}': {name} requires a gradient, but parameters are constants of a step, expected a number or a 0-d tensor without "
                f"gradient: pass {name}.detach(); to train it, use token_stats or linear_token_stats and sum the loss's terms yourself"
            )


def resolve_twin(loss: TokenLoss) -> Callable | None:
    """The @triton.jit function of a loss; None without one, where Triton is not installed, or with a parameter set that it does not know."""
    if not _twin_knows_all(loss):
        return None
    if not isinstance(loss.twin, str):
        return loss.twin
    if find_spec("triton") is None:
        return None
    module, _, name = loss.twin.rpartition(".")
    return getattr(import_module(module), name)


def _keywords(loss: TokenLoss) -> list[inspect.Parameter]:
    """The parameters of the loss's function after (stats, inputs), in the order of its signature."""
    return [p for p in list(inspect.signature(loss.fn).parameters.values())[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _twin_knows_all(loss: TokenLoss) -> bool:
    """Whether every parameter that the twin does not take has its default; a tensor has not, since reading it would stop the device."""
    if loss.twin_params is None:
        return True
    defaults = {p.name: p.default for p in _keywords(loss) if p.name not in loss.twin_params}
    return all(is_neutral(value, defaults[name]) for name, value in loss.params.items() if name in defaults)


def _twin_params(loss: TokenLoss) -> tuple[Number, ...]:
    """Values of the twin's parameters in the order of the signature: p0, p1, ..."""
    keywords = [p for p in _keywords(loss) if loss.twin_params is None or p.name in loss.twin_params]
    if len(keywords) > MAX_PARAMS:
        raise ValueError(f"loss '{loss.name}' has {len(keywords)} parameters, a twin takes {MAX_PARAMS} (kernels/weighting.py); drop its twin")
    return tuple(loss.params.get(p.name, p.default) for p in keywords)
