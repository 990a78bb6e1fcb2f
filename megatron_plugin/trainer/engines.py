"""The rollout engines of a run: started or connected, always with the newest weights, brought back when they die."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_plugin.config import ConfigError, as_config_error
from megatron_plugin.hooks.weights.files import TOKENIZER_FILES, copy_files
from megatron_plugin.rollout.engine import Health, RolloutEngine
from megatron_plugin.rollout.fleet import Fleet
from megatron_plugin.rollout.serve import ENGINE_DTYPES, engine_options
from megatron_plugin.rollout.transfer import TRANSPORTS, Transport
from megatron_plugin.rollout.vllm_http import connect_engine, start_engine
from megatron_plugin.rollout.vllm_model import describe_model
from megatron_plugin.rollout.vllm_process import EngineOptions, is_loopback
from megatron_plugin.trainer import signals
from megatron_plugin.trainer.hf_engine import end_ids
from megatron_plugin.trainer.hf_model import hf_config_for
from megatron_plugin.trainer.leaders import Leaders
from megatron_plugin.trainer.model import DTYPES
from megatron_plugin.trainer.run import Run
from megatron_plugin.trainer.weight_sync import WeightSync

__all__ = ["Engines"]

log = logging.getLogger("megatron_plugin")


class Engines:
    """Every rank makes one and calls its functions together; only leaders hold engines."""

    def __init__(self, run: Run, leaders: Leaders):
        self.run, self.config, self.leaders = run, run.config.rollout, leaders
        run_dir = Path(run.config.run_dir)
        with as_config_error("model"):
            self.hf_config, origin = hf_config_for(run_dir, _values(run), run.data.vocab_size)
        self.folder = run_dir / "engine"
        if dist.get_rank() == 0:
            _write_model(self.folder, self.hf_config, origin, run_dir / "tokenizer")
        dist.barrier(group=leaders.world)
        self.stop_token_ids = end_ids(run.data.tokenizer, self.folder)
        self.dtype = run.config.train.dtype if self.config.dtype == "auto" else self.config.dtype
        self.transfer = self.config.transfer if self.config.transfer != "auto" else "nccl" if torch.cuda.is_available() else "shm"
        self.sync = WeightSync(
            run.chunks, leaders, vocab_size=self.hf_config["vocab_size"], dtype=DTYPES[self.dtype], bucket_bytes=self.config.bucket_mb << 20,
            checksums=self.config.checksums,
        )  # fmt: skip
        self.fleet: Fleet | None = None
        self.transport: Transport | None = None
        self.step = -1
        """Optimizer steps behind the weights that were sent last."""
        self.first_version = 0
        """Of the weights at step 0: above what a server has from another run, or from this one before it was resumed."""
        self.sleeps, self.asleep = self.config.sleep and torch.cuda.is_available(), False
        self._check_devices()
        leaders.on_leaders(self._start)
        self.first_version = max(leaders.everyone(self.first_version))

    @property
    def version(self) -> int:
        """Of the weights that were sent last: one more with each optimizer step."""
        return self.first_version + self.step

    def report(self) -> list[str]:
        """For the terminal."""
        names = [name for said in self.leaders.everyone([engine.name for engine in self.fleet.engines] if self.fleet else []) for name in said]
        return [f"rollout engines: {', '.join(names)} ({self.dtype}); weights by {self.transfer} in buckets of {self.config.bucket_mb} MiB"]

    def refresh(self, step: int) -> None:
        """Bring dead engines back, and give all of them the weights of `step` unless they have them."""
        self.step = step
        self.leaders.on_leaders(self._wake)  # also where nothing is sent: after an evaluation they sleep with the newest weights
        if any(self.leaders.everyone(self.fleet is not None and bool(self.fleet.dead()))):
            self.recover()
        elif any(self.leaders.everyone(self._behind())):
            self.sync.send(self.fleet, self.transport, self.version)

    def recover(self) -> None:
        """After engines were lost: restart them, and send all of them the weights again.  EngineLostError when none comes back.

        As a new version: a server that only seemed lost has the old one already, and versions only go up."""
        self.leaders.on_leaders(signals.breakable(self._restart))
        self.first_version += 1
        self.sync.send(self.fleet, self.transport, self.version)

    def rest(self) -> None:
        """The engines give their GPU memory to the trainer until the next `refresh`, where the configuration says so."""
        if self.sleeps:
            self.leaders.on_leaders(self._sleep)

    def healthy(self) -> int:
        """HEALTHY engines of this leader, as far as is known."""
        return sum(state is Health.HEALTHY for state in self.fleet.states().values()) if self.fleet is not None else 0

    def close(self) -> None:
        """End child processes; servers are left running."""
        if self.fleet is not None:
            self.fleet.close()
        if self.transport is not None:
            self.transport.close()

    def _behind(self) -> bool:
        return self.fleet is not None and any(engine.weight_version != self.version for engine in self.fleet.engines)

    def _sleep(self) -> None:
        self.fleet.sleep()
        self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            self.fleet.wake()
            self.asleep = False

    def _restart(self) -> None:
        if dead := self.fleet.dead():
            for name, cause in dead.items():
                log.warning("restarting rollout engine %s: %s", name, cause)
            self.fleet.restart_dead()

    def _check_devices(self) -> None:
        """Children without devices of their own take their leader's: on one machine all leaders see the same ones."""
        hosts = [host for host in self.leaders.everyone(socket.gethostname() if self.leaders.leads else None) if host]
        if torch.cuda.is_available() and not self.config.url and not self.config.devices and len(set(hosts)) < len(hosts):
            raise ConfigError(f"got nothing, expected the GPUs of each of {len(hosts)} engines: several are started on one machine, and would take the same "
                              "ones; for example rollout.devices=['4,5','6,7']", "rollout.devices", self.run.config.sources.get("rollout.engines"))  # fmt: skip

    def _start(self) -> None:
        """On a leader: its engines."""
        config, make = self.config, TRANSPORTS[self.transfer]
        with as_config_error("rollout.bind", self.run.config.sources.get("rollout.bind")):
            self.transport = make() if self.transfer == "shm" else make(bind=config.bind)
        engines = [self._connect(url) for url in config.url[self.leaders.index :: self.leaders.count]] or [self._child()]
        self.first_version = 1 + max(engine.newest_version for engine in engines)
        self.fleet = Fleet(engines, timeout_s=config.timeout_s, max_restarts=config.max_restarts)

    def _child(self) -> RolloutEngine:
        with as_config_error("model.kv_channels", self.run.config.sources.get("model")):  # heads that vLLM's attention on a CPU has not
            options = self._options()
        print(f"starting vLLM on {self.folder} (log: {options.log})", flush=True)
        return start_engine(options)

    def _connect(self, url: str) -> RolloutEngine:
        """The server at `url`, if it serves our model and takes weights as we send them."""
        where = self.run.config.sources.get("rollout.transfer")
        if self.transfer == "shm" and not is_loopback(urlsplit(url).hostname or ""):
            raise ConfigError(f"got shm, expected gloo or nccl for {url}: it is on another machine, which shares no memory with this one",
                              "rollout.transfer", where)  # fmt: skip
        expected = describe_model(str(self.folder), dtype=ENGINE_DTYPES[self.dtype], max_model_len=self.run.config.data.seq_length)
        engine = connect_engine(url, expected, start_timeout_s=self.config.start_timeout_s, owner=self._owner())
        if engine.backend != self.transport.backend:
            raise ConfigError(f"got {self.transfer}, expected that of the server {url}, {engine.backend}: start it with "
                              f"--transfer {self.transfer}", "rollout.transfer", where)  # fmt: skip
        return engine

    def _owner(self) -> str:
        """This run, for servers: the same when it is resumed on this machine."""
        return f"{socket.gethostname()}:{Path(self.run.config.run_dir).resolve()}"

    def _options(self) -> EngineOptions:
        config = self.config
        return engine_options(
            str(self.folder), devices=config.devices[self.leaders.index] if config.devices else None, dtype=self.dtype, memory=config.memory, max_model_len=self.run.config.data.seq_length, tensor=config.tensor,
            max_num_seqs=max(128, config.n, config.eval_n), transfer=self.transfer, seed=self.run.config.seed, sleep=config.sleep,
            log=str(self.folder / f"engine{self.leaders.index}.log"), start_timeout_s=config.start_timeout_s,
        )  # fmt: skip


def _values(run: Run) -> dict[str, Any]:
    """The configuration as config.yaml would have it, which is not written yet."""
    config = run.config
    return {"model": config.model, "data": {"seq_length": config.data.seq_length}, "checkpoint": {"init": config.checkpoint.init}}


def _write_model(folder: Path, hf_config: dict[str, Any], origin: Path | None, tokenizer: Path) -> None:
    """A Hugging Face directory without weights: an engine starts from it, and gets them from the trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (tokenizer, *([origin] if origin else [])):
        copy_files(source, folder, (*TOKENIZER_FILES, "generation_config.json"))
    (folder / "config.json").write_text(json.dumps(hf_config, indent=1), "utf-8")
