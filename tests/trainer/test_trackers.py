"""Weights & Biases and MLflow: what they get, that a resumed run goes on there, and that none of them can hold a run up.

The fakes stand in for a service; the last two tests are of the real packages, offline."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_plugin.config import ConfigError, load_config
from megatron_plugin.config.schema import LogConfig
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.trainer import trackers
from megatron_plugin.trainer.metrics import RunLog
from megatron_plugin.trainer.trackers import Tracker, close_all, trackers_of


class Service:
    def __init__(self, fails: tuple[int, ...] = ()):
        self.got, self.fails, self.finished = [], fails, False

    def log(self, step, metrics):
        if step in self.fails:
            raise ConnectionError("https://me:secret@host: gone\nand more")
        self.got.append((step, metrics))

    def finish(self, *, failed):
        self.finished, self.failed = True, failed


def test_every_step_arrives_and_what_is_not_a_number_does_not(tmp_path):
    service = Service()
    log = RunLog(tmp_path, steps=3, resumed_at=0, leader=True, trackers=lambda: [Tracker("wandb", lambda: service)])
    for step in (1, 2, 3):
        log.step(step, {"train/loss": float(step), "train/nll": float("nan")}, show=False)
    log.close()
    assert service.got == [(step, {"train/loss": float(step)}) for step in (1, 2, 3)] and service.finished


def test_what_a_service_refuses_is_said_once_and_counted(tmp_path, capsys):
    service = Service(fails=(2, 3))
    tracker = Tracker("mlflow", lambda: service)
    log = RunLog(tmp_path, steps=5, resumed_at=0, leader=True, trackers=lambda: [tracker])
    for step in (1, 2, 3, 4, 5):
        log.step(step, {"train/loss": 1.0}, show=False)
        while tracker._steps.qsize() or tracker.failed < sum(s <= step for s in service.fails):
            time.sleep(0.001)
    log.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(said) == 1 and said[0].startswith("mlflow: ConnectionError: https://***@host: gone; training goes on") and "secret" not in said[0]
    assert [step for step, _ in service.got] == [1, 4, 5] and read_metrics(tmp_path)[-1]["log/mlflow_failed"] == 2


def test_a_service_that_cannot_be_opened_is_asked_again(monkeypatch):
    tries = []

    def start():
        tries.append(len(tries))
        if len(tries) < 2:
            raise OSError("no network")
        return service

    service = Service()
    tracker = Tracker("wandb", start)
    tracker.log(1, {})
    tracker.log(2, {})  # not yet
    while tracker.failed < 2:
        time.sleep(0.001)
    assert tries == [0] and "no network" in tracker.news() and tracker.news() == ""
    monkeypatch.setattr(trackers, "AGAIN_S", 0.0)
    tracker.log(3, {"a": 1.0})
    close_all([tracker])
    assert service.got == [(3, {"a": 1.0})] and tracker.failed == 2


def test_a_service_that_hangs_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(trackers, "WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.05)
    hung = threading.Event()
    tracker = Tracker("wandb", hung.wait)
    begin = time.perf_counter()
    for step in range(20):
        tracker.log(step, {})
    close_all([tracker])
    assert time.perf_counter() - begin < 1 and tracker.failed >= 16 and "3 steps wait for it" in tracker.news()
    hung.set()


@pytest.mark.parametrize("failed", [False, True])
def test_a_service_learns_how_the_run_ended_and_once(tmp_path, failed):
    service = Service()
    log = RunLog(tmp_path, steps=3, resumed_at=0, leader=True, trackers=lambda: [Tracker("wandb", lambda: service)])
    log.step(1, {"train/loss": 1.0}, show=False)
    log.close(failed=failed)
    log.close()
    assert service.finished and service.failed is failed and len(service.got) == 1


@pytest.mark.parametrize("override, wrong", [
    ("log.mlflow=https://me:pw@host", "MLFLOW_TRACKING_USERNAME"), ("log.mlflow=ftp://host/x", "expected http"), ("log.wandb=a/b/c", "entity/project"),
    ("log.mlflow=https://[bad", "expected http"), ("log.peak_tflops=-1", "at least 0"), ("profile.first_step=21", "at most train.steps"), ("profile.steps=0", "at least 1"),
    ("profile.ranks=x", "a whole number or a list"),
])  # fmt: skip
def test_wrong_keys_are_refused(override, wrong):
    with pytest.raises(ConfigError, match=wrong) as caught:
        load_config("configs/debug_cpu.yaml", ["profile.first_step=3", override])
    assert "pw" not in str(caught.value).replace("PASSWORD", "")


def test_ranks_that_are_not_there_are_refused():
    assert load_config("configs/debug_cpu.yaml", ["profile.ranks=1", "profile.first_step=2"], world_size=2).profile.ranks == [1]
    with pytest.raises(ConfigError, match="profile.ranks: got 2, expected ranks from 0 to 1"):
        load_config("configs/debug_cpu.yaml", ["profile.ranks=[0,2]", "profile.first_step=2"], world_size=2)


def test_a_package_that_is_missing_is_refused_at_once(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # as a run makes it, where it was once installed
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if not _there("wandb"):
        with pytest.raises(ConfigError, match="pip install wandb"):
            load_config(Path(__file__).parents[2] / "configs/debug_cpu.yaml", ["log.wandb=project"])


def test_a_secret_is_not_sent(tmp_path):
    config = replace(config_of(tmp_path, wandb="project"), loss={"name": "sft", "api_key": "hunter2", "url": "http://me:hunter2@host"})
    sent = trackers._flat(config)
    assert "hunter2" not in str(sent) and sent["loss.api_key"] == "***" and sent["loss.url"] == "http://***@host" and sent["train.micro_batch"] == 2


def _there(name: str) -> bool:
    import importlib.util

    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def config_of(tmp_path, **log: str):
    return replace(load_config("configs/debug_cpu.yaml", [f"run_dir={tmp_path}/run", "data.tokenizer=/secret/path"]), log=LogConfig(**log))


def recorded(config, steps) -> None:
    os.makedirs(config.run_dir, exist_ok=True)
    (tracker,) = trackers_of(config)
    for step in steps:
        tracker.log(step, {"train/loss": 1 / step})
    close_all([tracker])
    assert tracker.failed == 0, tracker.news()


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(tmp_path, wandb="somebody/somewhere")
    recorded(config, (1, 2))
    recorded(config, (2, 3))
    number = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]["id"]
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{number}.wandb"] * 2, "one run at the service, in two parts"
    deadline = time.monotonic() + 20
    while min(path.stat().st_size for path in files) < 1000 and time.monotonic() < deadline:
        time.sleep(0.05)  # W&B's own process writes them, also after finish() has returned
    texts = [path.read_bytes() for path in files]
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert all(b"train/loss" in text and b"somewhere" in text and b"train.micro_batch" in text for text in texts)


def test_mlflow_in_a_directory(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    config = config_of(tmp_path, mlflow=f"{tmp_path}/kept", run_name="first")
    recorded(config, (1, 2))
    recorded(config, (3,))
    from mlflow import MlflowClient

    client, number = MlflowClient(tracking_uri=f"{tmp_path}/kept"), json.loads((tmp_path / "run/trackers.json").read_text())["mlflow"]["id"]
    (run,) = client.search_runs([client.get_experiment_by_name("megatron-plugin").experiment_id])
    assert run.info.run_id == number and run.info.run_name == "first" and run.info.status == "FINISHED" and run.data.params["train.micro_batch"] == "2"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true" and len(run.data.params) > 60
    assert [(m.step, m.value) for m in client.get_metric_history(number, "train/loss")] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
