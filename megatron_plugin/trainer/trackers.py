"""Weights & Biases and MLflow beside metrics.jsonl: rank 0 hands each step over, a thread passes it on.

A service that is slow, full or gone costs the run nothing: it is said once and counted (log/wandb_failed, log/mlflow_failed), and asked
again a minute later.  A run that resumes goes on with its run there (<run_dir>/trackers.json); what it did after its last checkpoint, and
does again, is in there twice.  Keys are those of the services' own variables and files; the configuration is sent with its secrets masked.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_plugin.config import Config, to_yaml
from megatron_plugin.trainer.manifest import write_text

__all__ = ["Tracker", "close_all", "trackers_of"]

FILE = "trackers.json"
WAITING = 1000
"""Steps that wait for a slow service."""
AGAIN_S = 60.0
CLOSE_S = 30.0
"""Seconds that the end of a run, also after SIGTERM, waits for what all services together have not taken yet."""
FAILED_S = 5.0
"""The same where the run has failed: the other ranks wait for its error."""
LOGIN = re.compile(r"(//)[^/\s@]+@")


class Service(Protocol):
    """One run at one service; any of them may raise anything."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, *, failed: bool) -> None: ...


class Tracker:
    """A service and the thread that talks to it."""

    def __init__(self, name: str, start: Callable[[], Service]):
        """start: opens the run at the service, in the thread."""
        self.name, self.failed = name, 0
        self._start, self._service, self._tried = start, None, -math.inf
        self._problem, self._said, self._run_failed = "", False, False
        self._steps: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)  # daemon: a service that hangs must not keep the job
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Returns at once."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        try:
            self._steps.put_nowait((step, finite))
        except queue.Full:
            self._fail(f"{WAITING} steps wait for it")

    def news(self) -> str:
        """What there is to say to people: the first problem, once."""
        if not self._problem or self._said:
            return ""
        self._said = True
        return f"{self.name}: {self._problem}; training goes on, metrics.jsonl has everything, log/{self.name}_failed counts the steps that {self.name} does not have"

    def end(self, *, failed: bool) -> None:
        """No more steps will come.  failed: the run ends with an error."""
        self._run_failed = failed
        with contextlib.suppress(queue.Full):
            self._steps.put_nowait(None)

    def wait(self, until: float) -> None:
        """For what is on its way, after `end`; `until` a time of time.monotonic."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"{self._steps.qsize()} steps were not taken in time at the end", steps=self._steps.qsize())

    def _run(self) -> None:
        while (item := self._steps.get()) is not None:
            try:
                if service := self._opened():
                    service.log(*item)
                else:
                    self.failed += 1
            except Exception as error:  # whatever a foreign package raises
                self._fail(_one_line(error))
        try:
            if self._service is not None:
                self._service.finish(failed=self._run_failed)
        except Exception as error:
            self._fail(_one_line(error), steps=0)

    def _opened(self) -> Service | None:
        if self._service is None and time.monotonic() - self._tried >= AGAIN_S:
            self._tried = time.monotonic()
            self._service = self._start()
        return self._service

    def _fail(self, problem: str, *, steps: int = 1) -> None:
        self.failed += steps
        self._problem = self._problem or problem


def close_all(trackers: Sequence[Tracker], *, failed: bool = False) -> None:
    """The end of a run: waits for all of them, CLOSE_S at most (FAILED_S)."""
    for tracker in trackers:
        tracker.end(failed=failed)
    until = time.monotonic() + (FAILED_S if failed else CLOSE_S)
    for tracker in trackers:
        tracker.wait(until)


def trackers_of(config: Config) -> list[Tracker]:
    """Those that `log` names; called by rank 0."""
    found = []
    if config.log.wandb:
        found.append(Tracker("wandb", lambda: _Wandb(config)))
    if config.log.mlflow:
        found.append(Tracker("mlflow", lambda: _MLflow(config)))
    return found


class _Wandb:
    def __init__(self, config: Config):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its own crashes are reported to its makers
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):  # a question nobody answers would hold it up
            raise RuntimeError("no key for Weights & Biases: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline")
        entity, _, project = config.log.wandb.rpartition("/")
        known = _known(config, "wandb", config.log.wandb)
        number = known or uuid.uuid4().hex[:8]
        # console: it would wrap stdout; meta: command line, user and host; requirements: all packages
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True, x_save_requirements=False)
        self._run = wandb.init(project=project, entity=entity or None, id=number, resume="allow", name=_name(config), dir=config.run_dir,
                               config=_flat(config), settings=settings, reinit="create_new")  # fmt: skip
        _remember(config, "wandb", config.log.wandb, number)
        self._run.define_metric("*", step_metric="step")  # with W&B's own counter the steps that a resumed run does again would be dropped

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, config: Config):
        address = config.log.mlflow
        if "://" not in address or address.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since 3.12 MLflow asks whether a directory is meant
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=address)
        self._id = _known(config, "mlflow", address)
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "megatron-plugin"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=_name(config)).info.run_id
        self._client.log_batch(self._id, params=[Param(key, str(value)[:500]) for key, value in _flat(config).items()])
        _remember(config, "mlflow", address, self._id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def finish(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _name(config: Config) -> str:
    return config.log.run_name or Path(config.run_dir).name


def _flat(config: Config) -> dict[str, Any]:
    """{dotted key: value}, secrets masked."""
    values = yaml.safe_load(to_yaml(config))
    inner = {f"{name}.{key}": value for name, section in values.items() if isinstance(section, dict) for key, value in section.items()}
    return {name: value for name, value in values.items() if not isinstance(value, dict)} | inner


def _known(config: Config, service: str, place: str) -> str:
    """The number of this run directory's run at that place of the service; "": none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = json.loads((Path(config.run_dir) / FILE).read_text())[service]
        return str(kept["id"]) if kept["place"] == place else ""
    return ""


_FILE_LOCK = threading.Lock()


def _remember(config: Config, service: str, place: str, number: str) -> None:
    path = Path(config.run_dir) / FILE
    with _FILE_LOCK:
        kept = {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(path.read_text())
        write_text(path, json.dumps(kept | {service: {"place": place, "id": number}}, indent=1) + "\n")


def _one_line(error: Exception) -> str:
    """Without a login that an address may hold."""
    first = (str(error).strip().splitlines() or [""])[0]
    return LOGIN.sub(r"\1***@", f"{type(error).__name__}: {first}")[:300]
