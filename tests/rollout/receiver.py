"""The other end of a transport without a vLLM: takes buckets apart with the functions that run inside vLLM."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_plugin.rollout.engine import EngineError, EngineLostError
from megatron_plugin.rollout.transports.bucket import Manifest, tensors_of
from megatron_plugin.rollout.transports.gloo import broadcast, join


class Receiver:
    """An engine that keeps what it is sent.  `fail`: {name of a method: error}, raised there; `die_at`: number of the push at which it is lost."""

    workers = 1

    def __init__(self, transport, *, fail=None, die_at=None):
        self.backend, self.name = transport.backend, f"receiver {id(self)}"
        self.fail, self.die_at = dict(fail or {}), die_at
        self.weights, self.sizes, self.calls, self.group = {}, [], [], None
        self.at_push = lambda: None

    def _called(self, method):
        self.calls.append(method)
        if method in self.fail:
            raise self.fail[method]

    def begin_update(self, version):
        self._called("begin_update")
        self.weights, self.sizes = {}, []

    def init_transfer(self, invitation):
        self._called("init_transfer")
        timeout = timedelta(seconds=invitation["timeout_s"])
        store = dist.TCPStore(invitation["address"], invitation["port"], invitation["world_size"], False, timeout)
        self.group = join(store, 1, invitation["world_size"], invitation["address"], timeout)

    def push(self, update_info):
        if self.die_at == len(self.sizes):
            self.group = None  # closes its connections, as the end of a process does
            raise EngineLostError(f"{self.name} died")
        if self.group is not None:
            data = torch.empty(update_info["size"], dtype=torch.uint8)
            broadcast(self.group, data).wait()
        else:
            data = torch.frombuffer(bytearray(Path(update_info["path"]).read_bytes()), dtype=torch.uint8)
        self._called("push")
        self.at_push()
        try:
            for name, tensor in tensors_of(Manifest.of(update_info), data):
                self.weights[name] = tensor.clone()
        except ValueError as error:
            raise EngineError(str(error)) from error
        self.sizes.append(data.numel())

    def finish_update(self):
        self._called("finish_update")

    def abort_update(self):
        self._called("abort_update")
        self.weights = {}
