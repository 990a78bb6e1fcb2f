"""What runs inside vLLM: one of two modules that import it, with vllm_mixing.py.  vLLM loads this one into each of its processes (entry point
vllm.general_plugins); the trainer only for NCCL.

Three weight-transfer backends (BACKENDS) on vLLM's own start/update/finish API, which differ in how a bucket's bytes come in:

    start    initialize_layerwise_reload: vLLM's load_weights alone fails on CPUs, whose linear layers keep a prepacked copy only
    update   receive the bytes; check names, shapes, dtypes and checksums; load
    finish   finalize_layerwise_reload; refuse an update that was not full; tied heads on CPUs again
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from vllm import __version__ as VLLM_VERSION
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from megatron_plugin.rollout.expected_weights import ExpectedWeights
from megatron_plugin.rollout.lease import Lease
from megatron_plugin.rollout.transports.bucket import Manifest, tensors_of
from megatron_plugin.rollout.transports.gloo import broadcast, join
from megatron_plugin.rollout.transports.shm import received
from megatron_plugin.rollout.vllm_model import computation, read_config
from megatron_plugin.rollout.vllm_versions import BACKENDS, check_vllm
from megatron_plugin.rollout.watchdog import watch_parent

__all__ = ["GlooBackend", "NcclBackend", "SharedMemoryBackend", "WorkerExtension", "nccl_trainer_group", "register"]


def register() -> None:
    """Entry point: once in each of vLLM's processes, also in those of a user who has nothing to do with this project; so it only adds names."""
    watch_parent()
    for name, cls in (("shm", "SharedMemoryBackend"), ("gloo", "GlooBackend"), ("nccl", "NcclBackend")):
        if BACKENDS[name] not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(BACKENDS[name], __name__, cls)


@dataclass
class Invitation(WeightTransferInitInfo):
    """To a group whose rank 0 is the trainer.  Not needed for shared memory."""

    address: str = ""
    port: int = 0
    world_size: int = 0
    timeout_s: float = 120.0


@dataclass
class Update(WeightTransferUpdateInfo):
    """A bucket: the fields of Manifest, and for shared memory the file that holds it."""

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    size: int = 0
    path: str = ""


class _Backend(WeightTransferEngine[Invitation, Update]):
    """What all transports share."""

    init_info_cls = Invitation
    update_info_cls = Update
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module):
        super().__init__(config, vllm_config, device, model)
        check_vllm(VLLM_VERSION)
        self.expected: ExpectedWeights | None = None
        self.updating = False

    def receive(self, update: Update) -> Tensor:
        """The bucket's bytes, [bytes] uint8.  The tensor is not written to afterwards."""
        raise NotImplementedError

    def init_transfer_engine(self, init_info: Invitation) -> None:
        """Nothing to join."""

    def leave(self) -> None:
        """After an update, or instead of it: nothing to leave."""

    def start_weight_update(self) -> None:
        if self.expected is None:  # not at start-up: it costs a second of imports, which the first update hides better than a waiting user
            dtype = str(self.model_config.dtype).removeprefix("torch.")
            self.expected = ExpectedWeights(self.model_config.hf_text_config, dtype)
        self.expected.restart()
        self.tied = _tied_layers(self.model)  # now: the reload gives each layer parameters of its own until it is finished
        initialize_layerwise_reload(self.model)
        self.updating = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():  # the base class synchronises always, which raises on a CPU
                torch.accelerator.synchronize()
        except BaseException:
            self.abort()
            raise

    def receive_weights(self, update_info: Update) -> None:
        """Load one bucket.  Received before it is checked: a peer in the middle of a broadcast must not wait for us.  Nothing is loaded
        of a bucket that does not fit."""
        data = self.receive(update_info)
        manifest = Manifest.of(vars(update_info))
        tensors = list(tensors_of(manifest, data))
        self.expected.check(manifest.names, manifest.dtypes, manifest.shapes)
        self.model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        missing = self.expected.missing()
        incomplete = missing or _incomplete_layers(self.model, self.tied)
        if incomplete:
            self.abort()
            raise ValueError(
                f"weights do not fit the served model: the update is not full, {len(incomplete)} missing ({', '.join(incomplete[:5])}): send every tensor of the model"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        self.updating = False
        _repack_heads(self.tied)
        self.leave()

    def abort(self) -> None:
        """End an update that came to nothing: layers that got all their weights have new ones, the others their old ones."""
        self.leave()
        if not self.updating:
            return
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():  # half a layer would be processed with memory that was never written
                info.loaded_weights.clear()
                info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)
        self.updating = False

    def shutdown(self) -> None:
        self.leave()


class SharedMemoryBackend(_Backend):
    """Buckets in files of the trainer's machine."""

    def receive(self, update: Update) -> Tensor:
        return received(update.path, update.size)


class _GroupBackend(_Backend):
    """In a group with the trainer, which is rank 0.  One for each update."""

    group: Any = None

    def rank(self) -> int:
        """Of this worker in the group."""
        config = self.parallel_config
        return 1 + config.data_parallel_index * config.world_size + config.rank

    def leave(self) -> None:
        self.group = None

    def joined(self) -> Any:
        """The group.  ValueError without one, where waiting for bytes would take until the timeout."""
        if self.group is None:
            raise ValueError(f"got weights without an invitation to a group: the trainer sends by another transport than {self.config.backend}")
        return self.group


class GlooBackend(_GroupBackend):
    """Buckets broadcast between CPUs."""

    def init_transfer_engine(self, init_info: Invitation) -> None:
        timeout = timedelta(seconds=init_info.timeout_s)
        store = torch.distributed.TCPStore(init_info.address, init_info.port, init_info.world_size, False, timeout)
        with socket.socket(socket.AF_INET6 if ":" in init_info.address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((init_info.address, init_info.port))  # sends nothing; tells which of our addresses the trainer sees
            address = probe.getsockname()[0]
        self.group = join(store, self.rank(), init_info.world_size, address, timeout)

    def receive(self, update: Update) -> Tensor:
        data = torch.empty(update.size, dtype=torch.uint8)
        broadcast(self.joined(), data).wait()
        return data


class NcclBackend(_GroupBackend):
    """Buckets broadcast between GPUs.  Never run: written from vLLM 0.32's nccl_common.py and nccl_engine.py."""

    def init_transfer_engine(self, init_info: Invitation) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        device = torch.accelerator.current_device_index()
        self.group = stateless_init_process_group(init_info.address, init_info.port, self.rank(), init_info.world_size, device)

    def receive(self, update: Update) -> Tensor:
        data = torch.empty(update.size, dtype=torch.uint8, device=self.device)
        self.joined().broadcast(data, src=0, stream=torch.cuda.current_stream())
        return data

    def leave(self) -> None:
        if self.group is not None:
            self.group.destroy()
        self.group = None


def nccl_trainer_group(address: str, port: int, world: int) -> Any:
    """Rank 0 of such a group, in the trainer's process.  Never run."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    check_vllm(VLLM_VERSION)
    return trainer_init({"master_address": address, "master_port": port, "world_size": world})


class WorkerExtension:
    """Mixed into vLLM's worker (--worker-extension-cls); methods are called by name over /collective_rpc."""

    def megatron_plugin_describe(self) -> dict[str, Any]:
        """What is served, for the trainer to compare with what it trains."""
        config, parallel = self.model_config, self.parallel_config
        hf, text = config.hf_config, config.hf_text_config
        ends = [getattr(hf, "eos_token_id", None), (config.try_get_generation_config() or {}).get("eos_token_id")]
        return {
            "architecture": (hf.architectures or [""])[0],
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "tied": bool(getattr(hf, "tie_word_embeddings", False)),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "computation": computation(read_config(config.model)) if os.path.isdir(config.model) else None,
            "workers": parallel.world_size * parallel.data_parallel_size,
            "end_token_ids": sorted({i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}),
            "backend": self.vllm_config.weight_transfer_config.backend if self.vllm_config.weight_transfer_config else "",
            "vllm": VLLM_VERSION,
            "engine_id": os.environ.get("MEGATRON_PLUGIN_ENGINE", ""),
        }

    def megatron_plugin_claim(self, owner: str) -> dict[str, Any] | None:
        """Whether this trainer may send weights (lease.py)."""
        return self.__dict__.setdefault("megatron_plugin_lease", Lease()).claim(owner)

    def megatron_plugin_release(self, owner: str) -> None:
        self.__dict__.setdefault("megatron_plugin_lease", Lease()).release(owner)

    def megatron_plugin_abort_update(self) -> None:
        """End an update that its trainer gave up; nothing where there is none."""
        engine = self.weight_transfer_engine
        if isinstance(engine, _Backend):
            engine.abort()
        self._weight_update_active = False  # vLLM keeps it after an error in finish_weight_update, and would refuse the next start


def _incomplete_layers(model: torch.nn.Module, tied: list[torch.nn.Module]) -> list[str]:
    """Layers that got a part of their parameters only, or none: "name (got of expected elements)".

    Buffers and the scales of attention are not in checkpoints; the padding of a vocabulary is not sent either, such a layer counts when it got nothing."""
    found = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_deferred_attention_layer(layer):
            continue
        expected = sum(get_tensor_load_numel(p) for p in layer.parameters(recurse=False))
        padded = hasattr(layer, "num_embeddings_padded") and info.load_numel > 0
        if info.load_numel < expected and not padded and layer not in tied:
            found.append(f"{name} ({info.load_numel} of {expected} elements)")
    return found


def _tied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers whose weight another one before them has, too: output heads tied to the embedding."""
    seen: set[int] = set()
    found = []
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.numel():
            found += [layer] if id(weight) in seen else []
            seen.add(id(weight))
    return found


def _repack_heads(tied: list[torch.nn.Module]) -> None:
    """On a CPU a head keeps a prepacked copy of its weight (cpu_linear), which the reload of a tied embedding leaves old: wrong logits, silently."""
    for layer in tied:
        if hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
