"""cpu_platform replaces names that are not ours: it must put every one back, and do nothing where there is a GPU."""

import warnings

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

warnings.filterwarnings("ignore", module=r"megatron\.core")
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402

from megatron_plugin.hooks.cpu_platform import cpu_platform  # noqa: E402

SEEDS = {"tp_rank": 0, "ep_rank": 0, "etp_rank": 0}  # otherwise megatron asks its process groups


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _foreign():
    """Everything that may be replaced, as it is now."""
    names = [(torch.cuda, n) for n in vars(torch.cuda)] + [(megatron_random, n) for n in vars(megatron_random)]
    return {(owner.__name__, name): getattr(owner, name, None) for owner, name in names}, _get_current_function_mode_stack()


def _changed(before):
    after, modes = _foreign()
    return {name for (_, name), value in before[0].items() if after[(_, name)] is not value}, len(modes) - len(before[1])


def test_puts_everything_back():
    before = _foreign()
    with cpu_platform():
        names = {"current_device", "synchronize", "current_stream", "_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED"}
        assert _changed(before) == (names, 1), "exactly what the docstring lists, no more"
    assert _changed(before) == (set(), 0)
    with pytest.raises(ZeroDivisionError), cpu_platform():
        1 / 0  # noqa: B018
    assert _changed(before) == (set(), 0)


def test_does_nothing_on_a_gpu_machine(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = _foreign()
    with cpu_platform():
        assert _changed(before) == (set(), 0)
    assert capsys.readouterr().out == ""


def test_says_so_once_on_rank_0(monkeypatch, capsys):
    with cpu_platform(), cpu_platform():
        pass
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "no CUDA device" in lines[0]
    monkeypatch.setenv("RANK", "1")
    with cpu_platform():
        pass
    assert capsys.readouterr().out == ""


def test_an_inner_one_keeps_the_streams():
    with cpu_platform():
        megatron_random.model_parallel_cuda_manual_seed(5, **SEEDS)
        tracker = megatron_random.get_cuda_rng_tracker()
        with cpu_platform():
            assert megatron_random.get_cuda_rng_tracker() is tracker
        assert megatron_random.get_cuda_rng_tracker() is tracker and tracker.states_


def test_cuda_means_cpu():
    with cpu_platform():
        made = [
            torch.zeros([], device="cuda"),
            torch.tensor([1.0], device="cuda:0"),
            torch.empty(2, device=torch.device("cuda", 0), pin_memory=True),
        ]
        made += [torch.ones(2).cuda(), torch.ones(2).to("cuda"), torch.ones(2).to(device="cuda"), torch.ones(2).pin_memory()]
        made += [torch.zeros(2, device=torch.cuda.current_device()), torch.nn.Linear(2, 2).cuda().weight]
        assert all(x.device.type == "cpu" for x in made)
        assert torch.ones(2).to("cuda", torch.float64).dtype == torch.float64
        assert torch.ones(2).type() == "torch.cuda.FloatTensor" and torch.ones(2).type(torch.int32).dtype == torch.int32
        torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
    assert torch.ones(2).type() == "torch.FloatTensor"


def _draws(tracker, name="model-parallel-rng"):
    with tracker.fork(name):
        return torch.rand(3)


def test_streams_are_reproducible_and_separate():
    with cpu_platform():
        torch.manual_seed(0)
        outside = torch.rand(2)
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            megatron_random.model_parallel_cuda_manual_seed(5, **SEEDS)
            tracker = megatron_random.get_cuda_rng_tracker()
            drawn.append([_draws(tracker), _draws(tracker), _draws(tracker, "expert-parallel-rng")])
            assert torch.equal(torch.rand(2), outside), "a fork must not move the stream outside"
        first, again = drawn
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_a_fork_inside_a_fork_goes_on():
    """As on CUDA from 0.16 on: the inner fork of the same stream continues it, and what follows continues the inner one."""
    with cpu_platform():
        megatron_random.model_parallel_cuda_manual_seed(5, **SEEDS)
        tracker = megatron_random.get_cuda_rng_tracker()
        with tracker.fork():
            straight = torch.rand(9)
        megatron_random.model_parallel_cuda_manual_seed(5, **SEEDS)
        with tracker.fork():
            parts = [torch.rand(3)]
            with tracker.fork():
                parts.append(torch.rand(3))
            parts.append(torch.rand(3))
        assert torch.equal(torch.cat(parts), straight)


def test_streams_that_do_not_fit_are_errors():
    with cpu_platform():
        tracker = megatron_random.get_cuda_rng_tracker()
        tracker.add("a", 1)
        with pytest.raises(ValueError, match="'a' with seed 2: the name or the seed is taken"):
            tracker.add("a", 2)
        with pytest.raises(ValueError, match="'b' with seed 1: the name or the seed is taken"):
            tracker.add("b", 1)
        with (
            pytest.raises(KeyError, match="never added; call megatron.core.tensor_parallel.model_parallel_cuda_manual_seed"),
            tracker.fork("c"),
        ):
            pass
