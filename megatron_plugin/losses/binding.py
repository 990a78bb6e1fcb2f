"""From what the user writes (a name, a dotted path, a function) to a TokenLoss that is known to work."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import Tensor

from megatron_plugin.losses import LOSSES
from megatron_plugin.losses.algebra import check_number
from megatron_plugin.losses.contract import TokenLoss
from megatron_plugin.losses.probe import check_once, is_token_local
from megatron_plugin.losses.regularisers import REGULARISERS

__all__ = ["bind"]

FORM = "a loss is fn(stats, inputs, *, parameter=default, ...) -> TokenTerms"
FILLED_LATER = {"vocab_size"}  # by TokenLoss.for_vocabulary, from the logits


def bind(loss: str | Callable | TokenLoss, /, **params: float | str | Tensor) -> TokenLoss:
    """The loss with its parameters, checked.

    loss: a name of LOSSES, a dotted path 'package.module.function', a function, or a TokenLoss whose parameters are to be changed.
    params: its keyword parameters, numbers, 0-d tensors or names; `entropy_bonus` and `z_loss` (coefficients) go with every loss.
    A function of yours is tried on made-up tokens to learn whether it is token-local, which costs milliseconds: bind once, not per step.
    ValueError for an unknown loss or parameter, a missing or impossible one, and a function that does not return one value per token.
    """
    found = _find(loss)
    if found.bound and not params:
        return found
    own = {name: value for name, value in params.items() if name not in REGULARISERS}
    added: dict[str, Any] = {name: value for name, value in params.items() if name in REGULARISERS}
    for name, value in added.items():
        check_number(found.name, name, value)
    bound = replace(found, params={**found.params, **own}, regularisers={**found.regularisers, **added}, bound=True, tried={})
    _check_parameters(bound)
    if _is_built_in(bound):
        if own:
            check_once(bound)
        return bound
    local = is_token_local(bound) and found.token_local
    return replace(bound, token_local=local)


def _find(loss: str | Callable | TokenLoss) -> TokenLoss:
    if isinstance(loss, TokenLoss):
        return loss
    if isinstance(loss, str):
        if loss in LOSSES:
            return LOSSES[loss]
        if "." not in loss:
            raise ValueError(
                f"unknown loss '{loss}'{_nearest(loss, LOSSES)}; expected one of {', '.join(sorted(LOSSES))}, or a function of yours "
                "as 'package.module.function'"
            )
        loss = _import(loss)
    if not callable(loss):
        raise ValueError(f"got a loss of type {type(loss).__name__}, expected a name of LOSSES, a dotted path, a function or a TokenLoss")
    # by its function too, a loss of ours keeps what LOSSES says of it
    return next((known for known in LOSSES.values() if known.fn is loss), TokenLoss(loss))


def _import(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:  # the last two: '.f', 'a..f'
        raise ValueError(
            f"loss '{path}': cannot import '{module_name}' ({error}); expected 'package.module.function' with the package on the "
            f"Python path, or one of {', '.join(sorted(LOSSES))}"
        ) from error
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"loss '{path}': module '{module_name}' has no '{name}'{_nearest(name, functions)}")
    return getattr(module, name)


def _nearest(got: str, valid: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in valid}
    near = difflib.get_close_matches(got.lower(), by_lower, n=1)
    return f" (did you mean '{by_lower[near[0]]}'?)" if near else ""


def _check_parameters(loss: TokenLoss) -> None:
    """ValueError unless loss.params fit the signature after (stats, inputs)."""
    try:
        signature = list(inspect.signature(loss.fn).parameters.values())
    except ValueError as error:
        raise ValueError(f"loss '{loss.name}' has no signature to check parameters against; {FORM}") from error
    by_position = [p for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_position) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in signature):
        raise ValueError(f"loss '{loss.name}' takes ({', '.join(map(str, signature))}); {FORM}")
    own = {p.name: p for p in signature if p not in by_position[:2] and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if clash := sorted(set(own) & set(REGULARISERS)):
        raise ValueError(f"loss '{loss.name}' has a parameter called {clash[0]}, which every loss takes as a regulariser; rename it")
    valid = ", ".join([*sorted(own), *REGULARISERS])
    if not any(p.kind == p.VAR_KEYWORD for p in signature):
        for name in sorted(set(loss.params) - set(own)):
            near = _nearest(name, [*own, *REGULARISERS])
            raise ValueError(f"loss '{loss.name}' has no parameter '{name}'{near}; expected one of {valid}")
    for name, parameter in own.items():
        if parameter.default is parameter.empty and name not in loss.params and name not in FILLED_LATER:
            raise ValueError(f"loss '{loss.name}' needs a value for its parameter '{name}', which has no default; it takes {valid}")


def _is_built_in(loss: TokenLoss) -> bool:
    return str(getattr(loss.fn, "__module__", "")).startswith("megatron_plugin.losses.")
