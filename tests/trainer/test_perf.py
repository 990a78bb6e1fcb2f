"""Operations of a model, peak of a device, memory; the profiler's window; running out of memory."""

import gzip
import json

import pytest
import torch

from megatron_plugin.config import load_config
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.rollout.engine import EngineLostError
from megatron_plugin.trainer import memory, perf, profiling
from megatron_plugin.trainer.flops import GPTSizes
from megatron_plugin.trainer.memory import is_out_of_memory
from tests.spawn import on_ranks

RANKS = "tests.trainer.perf_ranks"
SMALL = {"train.steps": 4, "train.global_batch": 4, "train.eval_interval": 0, "data.eval_answers": 0, "checkpoint.interval": 0}
MODELS = {
    "plain": {},
    "grouped queries, gated, wide heads": {"model.num_query_groups": 2, "model.gated_linear_unit": "true", "model.activation_func": "silu", "model.ffn_hidden_size": 96,
                                           "model.kv_channels": 32},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_torch_counts(name):
    """Matrix products of a real GPTModel, whose attention on a CPU makes the whole matrix."""
    counted, formula = on_ranks(1, RANKS, "flops", overrides=MODELS[name])[0]
    assert formula == pytest.approx(counted, rel=0.02)


def test_operations_of_a_published_model():
    """Llama 3 8B: 6 operations a parameter and token but for the embedding; attention on top, half of it where it is causal."""
    fields = dict(num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336, gated_linear_unit=True)
    sizes = GPTSizes.of(fields, 128_256)
    parameters = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # embedding, norms
    attention = 12 * 32 * 4096 * 8192
    assert sizes.step(tokens=1, length=8192, causal=False) == 6 * parameters + attention
    assert sizes.step(tokens=1, length=8192) == 6 * parameters + attention / 2
    assert sizes.step(tokens=10, length=8192) - sizes.step(tokens=10, length=8192, head_tokens=4) == 6 * 6 * 4096 * 128_256


def test_operations_of_a_mixture_of_experts():
    fields = dict(num_layers=5, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, num_moe_experts=8, moe_router_topk=3, moe_ffn_hidden_size=32,
                  moe_shared_expert_intermediate_size=16)  # fmt: skip
    dense = GPTSizes.of(fields | {"num_moe_experts": None}, 100).forward_token(0)
    saved = 2 * 64 * 2 * (256 - 3 * 32 - 16)
    for frequency, sparse in ((1, 5), (2, 3), ([0, 1, 0, 0, 1], 2)):
        assert dense - GPTSizes.of(fields | {"moe_layer_freq": frequency}, 100).forward_token(0) == sparse * saved


@pytest.mark.parametrize("field", ["multi_latent_attention", "mtp_num_layers", "window_size"])
def test_a_model_that_the_formula_is_not_of_has_no_number(field):
    assert GPTSizes.of(dict(num_layers=1, hidden_size=8, num_attention_heads=1, **{field: 1}), 10) is None


@pytest.mark.parametrize("name, dtype, tflops", [
    ("NVIDIA H200", torch.bfloat16, 989.4), ("NVIDIA H100 80GB HBM3", torch.float32, 66.9), ("NVIDIA H100 PCIe", torch.bfloat16, 756.0), ("NVIDIA B200", torch.bfloat16, 2250.0),
    ("NVIDIA GB200", torch.bfloat16, 2500.0), ("NVIDIA A100-SXM4-80GB", torch.float16, 312.0), ("NVIDIA H200 MIG 1g.18gb", torch.bfloat16, None),
    ("NVIDIA GeForce RTX 4090", torch.bfloat16, None), ("NVIDIA H200", torch.float64, None),
])  # fmt: skip
def test_the_peak_of_a_device_is_known_or_not_invented(name, dtype, tflops):
    peak = perf.peak_flops(name, dtype)
    assert peak is None if tflops is None else peak == pytest.approx(tflops * 1e12)


def test_fp32_with_tensor_cores_has_their_peak():
    assert perf.peak_flops("NVIDIA H200", torch.float32, tf32=True) == 494.7e12


def test_memory_is_the_most_there_was():
    before = perf.memory_gib()
    big = torch.ones(2**26)  # a quarter of a GiB, written to
    grown = perf.memory_gib()
    del big
    assert 0.05 < before < 100 and (torch.cuda.is_available() or grown > 0.2) and perf.memory_gib() > grown - 0.01


@pytest.fixture(scope="module")
def run(tmp_path_factory, problems) -> dict:
    """Overrides of a run of four steps on two ranks, profiled in the second and third, with a peak of its own."""
    overrides = problems | SMALL | {"run_dir": tmp_path_factory.mktemp("perf") / "run", "profile.first_step": 2, "profile.ranks": "[0,1]", "log.peak_tflops": 0.05,
                                    "parallel.tensor": 2, "train.eval_interval": 2}  # fmt: skip
    on_ranks(2, "tests.trainer.ranks", "train", overrides=overrides)
    return overrides


def test_a_trace_holds_our_loss_and_is_never_replaced(run):
    folder = run["run_dir"] / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps_2-3_rank0.json.gz", "steps_2-3_rank1.json.gz"]
    with gzip.open(folder / "steps_2-3_rank0.json.gz") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "Optimizer.step#AdamW.step"} & names and any("TokenLoss" in name for name in names), sorted(names)[:200]
    window = profiling.ProfileWindow.__new__(profiling.ProfileWindow)
    window._folder, window._began = folder, 2
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profiling.dist, "get_rank", lambda: 0)
        assert [window._free(3).name for _ in range(2)] == ["steps_2-3_rank0_2.json.gz", "steps_2-3_rank0_3.json.gz"]


def test_what_a_step_used_is_in_the_metrics(run):
    lines = read_metrics(run["run_dir"])
    config = load_config("configs/debug_cpu.yaml")
    sizes = GPTSizes.of(config.model, 320)
    for line in lines:
        done = sizes.step(tokens=4 * 64, length=64, head_tokens=line["train/num_tokens"])
        assert line["perf/mfu"] == pytest.approx(done / (line["perf/step_s"] * 2 * 0.05e12))
        parts = [line[f"perf/{name}_s"] for name in ("data", "forward_backward", "optimizer")]
        assert all(seconds > 0 for seconds in parts) and 0.8 * line["perf/step_s"] < sum(parts) <= line["perf/step_s"]
        assert line["perf/memory_gib"] > 0.1
    assert ["perf/evaluate_s" in line for line in lines] == [False, True, False, True] and lines[-1]["perf/save_s"] > 0


@pytest.mark.parametrize("how", ["host", "device"])
def test_out_of_memory_says_where_how_much_and_what_to_do(how, problems, tmp_path):
    overrides = problems | SMALL | {"run_dir": tmp_path / "run", "loss.name": "tests.trainer.greedy_loss.greedy", "log.peak_tflops": 0.05}
    text, code = on_ranks(1, RANKS, "out_of_memory", overrides=overrides, how=how)[0]
    first, said, order, *knobs = text.splitlines()
    assert code == 12 and first.startswith(f"step 2, rank 0: out of memory ({'host' if how == 'host' else 'GPU'})"), text
    assert "2 rows of 64 tokens" in first and "vocabulary 320" in first and "weights 0.000" in first and "optimizer 0.001" in first
    assert ("allocate" in said) and order == "in this order:" and "mfu" not in text
    wanted = ["train.micro_batch", *(["model.recompute_granularity"] if how == "device" else []), "train.dtype", "parallel.tensor", "data.seq_length",
              *(["PYTORCH_CUDA_ALLOC_CONF"] if how == "device" else [])]  # fmt: skip
    assert [knob.split("=")[0].strip() for knob in knobs] == [f"{number}. {key}" for number, key in enumerate(wanted, 1)]


@pytest.mark.parametrize("error, is_memory", [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True), (RuntimeError("std::bad_alloc"), True), (RuntimeError("shape mismatch"), False),
    (ValueError("can't allocate memory"), False), (OSError(12, "Cannot allocate memory"), False), (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True), (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True), (EngineLostError("vLLM ended: RuntimeError: DefaultCPUAllocator: not enough memory"), False),
])  # fmt: skip
def test_what_counts_as_out_of_memory(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_a_trace_that_cannot_be_ended_is_not_why_a_run_ends(tmp_path, caplog):
    class Broken:
        def stop(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    window = profiling.ProfileWindow.__new__(profiling.ProfileWindow)
    window._profile, window._began, window._folder = Broken(), 3, tmp_path / "profile"
    window.close(2)
    assert "the profile of steps 3 to 3 cannot be written" in caplog.text and "illegal memory access" in caplog.text


@pytest.mark.parametrize("micro, fewer", [(8, 4), (5, 1), (6, 3), (2, 1)])
def test_fewer_rows_still_divide_the_step(micro, fewer, monkeypatch):
    monkeypatch.setattr(memory.dist, "get_world_size", lambda: 1)
    config = load_config("configs/debug_cpu.yaml", [f"train.micro_batch={micro}", f"train.global_batch={3 * micro}"])
    assert memory._knobs(config, cuda=False)[0].startswith(f"train.micro_batch={fewer}:")
    load_config("configs/debug_cpu.yaml", [f"train.micro_batch={fewer}", f"train.global_batch={3 * micro}"])
