"""The room for megatron-core's signatures: the installed version fits, a fork that does not is told what it lacks."""

from types import SimpleNamespace

import pytest
import torch

from megatron_plugin.hooks import mcore

GOOD = dict(tensor=2, pipeline=2, layers=4, hidden=20, heads=4, vocabulary=384, micro_batch=2, global_batch=8)


def test_the_installed_version_fits():
    mcore.check_megatron_core()


def test_a_fork_is_told_everything_it_lacks(monkeypatch):
    monkeypatch.setitem(mcore.CALLS, "distributed:DistributedDataParallel", "config ddp_config module no_such_parameter")
    monkeypatch.setitem(mcore.CALLS, "models.gpt:NoSuchModel", "")
    monkeypatch.setitem(mcore.CALLS, "no_such_module:f", "")
    with pytest.raises(ImportError) as error:
        mcore.check_megatron_core()
    text = str(error.value)
    assert "megatron.core.distributed.DistributedDataParallel(no_such_parameter=...)" in text
    assert "megatron.core.models.gpt.NoSuchModel" in text and "megatron.core.no_such_module.f" in text and "0.14 to 0.19" in text


def test_data_parallel_size():
    assert mcore.data_parallel_size(8, **GOOD) == 2
    assert mcore.data_parallel_size(1, **GOOD | dict(tensor=1, pipeline=1)) == 1


@pytest.mark.parametrize(
    "world, change, message",
    [
        (6, {}, "got tensor x pipeline = 4 for 6 ranks, expected a divisor of 6"),
        (2, {}, "got tensor x pipeline = 4 for 2 ranks"),
        (3, dict(tensor=3, pipeline=1), "got tensor = 3 for 4 attention heads"),
        (5, dict(tensor=5, pipeline=1, heads=5), "got tensor = 5 for 384 columns of the padded vocabulary"),
        (3, dict(tensor=1, pipeline=3), "got pipeline = 3 for 4 layers"),
        (8, dict(micro_batch=3), "got micro batch x data-parallel ranks = 6 for 8 sequences of the global batch"),
        (4, dict(tensor=0), "got tensor=0, expected 1 or more"),
        (4, dict(pipeline=-1), "got pipeline=-1, expected 1 or more"),
        (4, dict(micro_batch=0), "got micro_batch=0, expected 1 or more"),
        (4, dict(hidden=6), "got heads = 4 for 6 hidden units"),
        (4, dict(eval_every=0), "got eval_every=0, expected 1 or more"),
    ],
)
def test_impossible_sizes(world, change, message):
    with pytest.raises(ValueError, match=message):
        mcore.data_parallel_size(world, **GOOD | change)


def test_two_interleaved_stages_that_would_swap_their_messages_are_refused():
    """megatron-core trains on with wrong numbers there (4 micro-batches: NLL 4.7614 instead of 4.7373)."""
    config = dict(num_layers=4, hidden_size=8, num_attention_heads=2, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    interleaved = mcore.make_config(**config, virtual_pipeline_model_parallel_size=2)
    assert interleaved.overlap_p2p_comm and not interleaved.batch_p2p_comm and interleaved.calculate_per_token_loss
    assert not mcore.make_config(**config).overlap_p2p_comm
    chunk = torch.nn.Module()
    chunk.config = mcore.make_config(**config, virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=False)
    with pytest.raises(ValueError, match="got config.overlap_p2p_comm=False for two interleaved pipeline stages, expected True"):
        mcore.forward_backward(None, [1, 2], [chunk, chunk], shape=(1, 8), train=True)


def test_the_context_group_is_found_under_either_name():
    """model_comm_pgs in 0.14, pg_collection since."""
    groups = SimpleNamespace(cp="the group")
    assert mcore.context_group_of({"pg_collection": groups}) == mcore.context_group_of({"model_comm_pgs": groups}) == "the group"
