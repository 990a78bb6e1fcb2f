"""Weights and optimizer state through megatron-core's dist_checkpointing: written by any layout, loaded by any other.

Every tensor is stored under a name of the model and its place in the whole, so TP, PP, interleaving, CP and DP may change in between.  What
megatron-core leaves open for the optimizer is closed here:

  state before the first step  the distributed optimizer with torch's Adam asserts (`len(steps) == 1`) where there is none: `_allocate`
  format of its shards         `fully_reshardable` where it is known (0.15 on), with tensors as whole as the model's.  The older default cuts
                               them with flattened_range, which later versions refuse to save; `dp_reshardable` fixes TP and PP
  step counts                  the distributed optimizer's load misses them among the tensors (KeyError: 'step'), and gives one count to all
                               parameters, to which Adam then adds 1 for each: `_load`
  plain <-> distributed        megatron-core has no way across.  Moments have equal names in both; weights in fp32, step and groups have not:
                               `_translated`
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_plugin.hooks.held_signals import signals_held
from megatron_plugin.hooks.mcore import device, groups

__all__ = ["Shards", "WriteError", "load_optimizer", "load_weights"]

_KNOWN = getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())
FORMAT = "fully_reshardable" if "fully_reshardable" in _KNOWN else "fully_sharded_model_space"
MAIN = {"fully_reshardable": "optimizer.state.param.", "fully_sharded_model_space": "optimizer.state.fp32_param."}[FORMAT]
LOADER = f"load_parameter_state_from_{FORMAT.replace('fully_sharded', 'fs')}"
HALF_MAIN = "optimizer.state.fp32_param."  # fp32 weights of the plain optimizer for half precision; the fp32 one has the model's own


class WriteError(OSError):
    """Some of a checkpoint is not on disk."""


class Shards:
    """One save in three parts, so that the middle one can run beside the training:

        shards = Shards(path, chunks, optimizer, copied=True)    # collective: who writes what, and the tensors to be written
        shards.write()                                           # this rank's files, in any thread; no collective
        shards.finish()                                          # collective: what makes them one checkpoint

    It is megatron-core's own save() without its barriers, in which an error of one rank (a full disk) would leave the others."""

    def __init__(self, path: Path, chunks: list, optimizer: MegatronOptimizer | None, *, copied: bool):
        """`path`: an empty directory.  `copied`: training goes on while `write` runs, so the tensors are copied (to host memory, on a GPU)."""
        sharded = _weights(chunks)
        if optimizer is not None:
            sharded["optimizer"] = _state(optimizer, sharded, is_loading=False)
        sharded, common = save_preprocess(sharded)
        if copied:
            common = copy.deepcopy(common)
            for tensor in nested_values(sharded):
                if isinstance(tensor, ShardedTensor) and tensor.data is not None and tensor.data.device.type == "cpu":
                    tensor.data = tensor.data.detach().clone()
        self.path, self._common, self._strategy = path, common, get_default_save_sharded_strategy()
        takes = inspect.signature(self._strategy.async_save).parameters
        built_in = {"async_strategy": "mcore"} if "async_strategy" in takes else {}  # 0.17 on; the other one is a package of its own
        with signals_held():
            self._request = self._strategy.async_save(sharded, str(path), **built_in)
        self._arguments = list(self._request.async_fn_args)
        if self._request.preload_fn is not None:
            self._arguments[1] = self._request.preload_fn()  # from the GPU, now: the next step changes the weights

    def write(self) -> None:
        """This rank's tensors, and on rank 0 the part that is not sharded.  OSError; what its writer processes meet is raised by `finish`."""
        try:
            if dist.get_rank() == 0:
                torch.save(self._common, self.path / "common.pt")
        finally:  # also after an error: `finish` waits for what it reports
            if self._request.async_fn is not None:
                with signals_held():
                    self._request.async_fn(*self._arguments, **self._request.async_fn_kwargs)

    def own_files(self) -> list[Path]:
        """What `write` has written on this rank."""
        common = [self.path / "common.pt"] if dist.get_rank() == 0 else []
        return [*common, *sorted(self.path.glob(f"__{dist.get_rank()}_*.distcp"))]

    def finish(self) -> None:
        """Rank 0 writes where each tensor is.  Every rank calls it, after `write` has ended on all of them, also where it failed.

        WriteError on every rank when a part could not be written."""
        try:
            for finalize in self._request.finalize_fns:
                finalize()
        except CheckpointException as error:  # of torch, from BaseException; the causes are known to rank 0
            causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
            raise WriteError(causes or "a rank could not write its part") from None
        except OSError as error:
            # Rank 0 alone, while it wrote .metadata: the others wait for its verdict, a broadcast of one int (0.14 to 0.19), which it never gave
            dist.broadcast(torch.ones(1, dtype=torch.int, device=device()), src=0)
            raise WriteError(f"rank {dist.get_rank()}: {error}") from error

    def describe(self) -> None:
        """Rank 0: metadata.json, which says which format this is."""
        save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(self.path))


def load_weights(path: Path, chunks: list) -> None:
    """Load the weights of a checkpoint of any layout into the chunks.  ValueError when it holds others than this model has."""
    loaded, missing, unexpected = dist_checkpointing.load(_weights(chunks), str(path), strict=StrictHandling.RETURN_ALL)
    left_over = sorted(key for key in missing if not key.startswith(("optimizer.", "chained_")))
    if left_over or unexpected:
        raise ValueError(
            f"got a checkpoint with {left_over[:4] or 'nothing'} beyond the model and without {sorted(unexpected)[:4] or 'nothing'} of it, expected the "
            "model's own parameters: were the embeddings tied, or had the layers biases, when it was saved? set model.* as then"
        )
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[_key(chunks, i)])


def load_optimizer(path: Path, chunks: list, optimizer: MegatronOptimizer) -> None:
    """Load the optimizer's state from a checkpoint of any layout, of this kind of optimizer or the other.

    After `load_weights`.  ValueError when the checkpoint has none, or one that fits no optimizer of ours."""
    saved = dist_checkpointing.load_common_state_dict(str(path)).get("optimizer")
    if saved is None:
        raise ValueError("got a checkpoint of weights alone, expected one with the optimizer's state; take its weights with checkpoint.init")
    sharding = saved.get("param_state_sharding_type")  # the distributed optimizer writes it
    if sharding not in (None, FORMAT):
        raise ValueError(
            f"got optimizer state in megatron-core's format '{sharding}', expected '{FORMAT}', which any layout can load; take its weights "
            "alone with checkpoint.init, or let what wrote it save it once more in that format"
        )
    wanted = _state(optimizer, _weights(chunks), is_loading=True)
    if (sharding is not None) == _is_distributed(optimizer):
        state = dist_checkpointing.load({"optimizer": wanted}, str(path))["optimizer"]
    else:
        state = _translated(path, optimizer, wanted, saved)
    _load(optimizer, state)


def _key(chunks: list, i: int) -> str:
    return "model" if len(chunks) == 1 else f"model{i}"


def _weights(chunks: list) -> dict[str, Any]:
    metadata = {"dp_cp_group": groups().dp_cp}
    return {_key(chunks, i): chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def _state(optimizer: MegatronOptimizer, weights: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    _allocate(optimizer)
    metadata = {"dp_cp_group": groups().dp_cp, "distrib_optim_sharding_type": FORMAT}
    return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers in a ChainedOptimizer (one, for a dense model), without those that have no parameter on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def _is_distributed(optimizer: MegatronOptimizer) -> bool:
    return any(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))


def _adam_states(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    """The state of each parameter where it is torch's Adam; Transformer Engine's and apex's count steps in the group."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            yield from part.optimizer.state.values()


def _allocate(optimizer: MegatronOptimizer) -> None:
    """Moments and steps of zero where there are none yet.  No weight changes, as one would by a dummy step with weight decay."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    for state in _adam_states(optimizer):
        state.setdefault("step", torch.tensor(0.0))


def _load(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict(state), with a step count of its own for each parameter of torch's Adam, which counts in place.

    The distributed optimizer's tensors are loaded while the step counts are away: it would look for them among the tensors."""
    whole = getattr(optimizer, "chained_optimizers", [optimizer])
    for i, part in enumerate(whole):
        its = state if len(whole) == 1 else state[i]
        if not isinstance(part, DistributedOptimizer):
            if next(_adam_states(part), None) is not None:  # a step of 0 is not stored
                its.get("optimizer", its)["state"].setdefault("common_step", torch.tensor(0.0))
            part.load_state_dict(its)
            continue
        part.load_state_dict({key: value for key, value in its.items() if key != "param_state"})
        steps = [adam.pop("step") for adam in _adam_states(part)]
        getattr(part, LOADER)(its["param_state"])
        for adam, step in zip(_adam_states(part), steps, strict=True):
            adam["step"] = step
    for adam in _adam_states(optimizer):
        adam["step"] = adam.get("step", torch.tensor(0.0)).clone()


def _translated(path: Path, optimizer: MegatronOptimizer, wanted: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from a checkpoint of the other kind: its tensors under their names there, its step, and this
    run's own parameter groups (rates, decay)."""
    if len(_parts(optimizer)) != 1:
        raise ValueError(f"got {len(_parts(optimizer))} chained optimizers, expected 1 to change between plain and distributed")
    own = optimizer.state_dict()
    if _is_distributed(optimizer):
        half = "optimizer" in saved  # the plain optimizer for half precision wraps the inner one's dict
        _rename(wanted["param_state"], MAIN, HALF_MAIN if half else "")
        loaded = dist_checkpointing.load({"moments": wanted["param_state"]}, str(path))["moments"]
        step = (saved["optimizer"] if half else saved)["state"].get("common_step", torch.tensor(0.0))
        param_groups = [group | {"step": float(step)} for group in own["optimizer"]["param_groups"]]
        own["optimizer"]["param_groups"] = param_groups
        return own | {"param_state": loaded, "param_state_sharding_type": FORMAT}
    _rename(wanted, HALF_MAIN, MAIN)
    loaded = dist_checkpointing.load({"moments": wanted}, str(path))["moments"]
    inner, own_inner = (loaded["optimizer"], own["optimizer"]) if "optimizer" in loaded else (loaded, own)
    inner["param_groups"] = own_inner["param_groups"]
    inner["state"]["common_step"] = torch.tensor(float(saved["optimizer"]["param_groups"][0]["step"]))
    return loaded


def _rename(sharded: dict[str, Any], before: str, after: str) -> None:
    """Ask for the tensors whose names begin with `before` under names that begin with `after`."""
    for tensor in nested_values(sharded):
        if isinstance(tensor, ShardedBase) and tensor.key.startswith(before):
            tensor.key = after + tensor.key.removeprefix(before)
