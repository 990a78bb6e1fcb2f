"""Every benchmark runs on a CPU from its command line to its result file, at shapes that take no time."""

import importlib
import json
import sys

import pytest
import torch

from benchmarks import page

NAMES = ["stats_forward", "loss_forward_backward", "grad_in_place", "linear_loss", "tensor_parallel", "min_weight", "chunk_size", "configs",
         "cpu_memory", "training_step"]  # fmt: skip
OURS = {"configs": 0, "training_step": 2}  # our contenders per shape, where it is not at least one that is called ours


@pytest.fixture(autouse=True)
def _no_groups_left():
    """megatron-core's losses need a process group, which must not outlive the test in this process."""
    before = torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized() and not before:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs(name, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", "--tiny", "--no-slow-start", "--out", str(out)])
    importlib.import_module(f"benchmarks.{name}").main()
    document = json.loads(out.read_text())
    ours = [row for row in document["rows"] if row["contender"].startswith("ours")]
    assert len(ours) >= OURS.get(name, 1)
    for row in ours:
        assert not row["reason"] and (row["ms"] or row["peak_mib"] is not None), row
    assert all(row["ms"] or row["reason"] or row["peak_mib"] is not None for row in document["rows"]), "a row has numbers or says why not"
    assert f"## {name}" in page.render(page.merge([document]))
