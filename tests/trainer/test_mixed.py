"""Two sources in one step: the gradient is the mixture of both computed apart, in every layout.  Real megatron-core on gloo ranks."""

import math

import pytest
import torch

from megatron_plugin.data import PackedBatch, pack_samples
from megatron_plugin.parallel.normaliser import Source
from megatron_plugin.trainer.mixed import MixedRows, train_mixed
from megatron_plugin.trainer.sources import token_inputs
from tests import tolerances as tol
from tests.hooks.layouts import _at, _distance, _whole
from tests.spawn import on_ranks
from tests.trainer.mixed_ranks import MU, samples

RANKS = "tests.trainer.mixed_ranks"
CASES = [("token", "token", True), ("token", "sequence", True), ("sequence", "constant", False), ("token", "sequence", False)]
LAYOUTS = {
    "TP1": (1, {}),
    "micro-batches of 2": (1, {"train.micro_batch": 2}),
    "micro-batches of 4": (1, {"train.micro_batch": 4}),
    "not packed": (1, {"data.packing": "false"}),
    "not packed, micro-batches of 4": (1, {"data.packing": "false", "train.micro_batch": 4}),
    "DP2": (2, {}),
    "DP2, not packed, micro-batches of 2": (2, {"data.packing": "false", "train.micro_batch": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "CP2, not packed": (2, {"parallel.context": 2, "data.packing": "false"}),
    "TP2+SP": (2, {"parallel.tensor": 2, "parallel.sequence": "true"}),
    "PP2xVPP2": (2, {"parallel.pipeline": 2, "parallel.virtual": 2}),
    "TP2xPP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "DP4, two ranks without a sample": (4, {}),
    "CP2xDP2, distributed optimizer": (4, {"parallel.context": 2, "parallel.distributed_optimizer": "true"}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return on_ranks(1, RANKS, "save", run_dir=str(tmp_path_factory.mktemp("weights") / "run"))[0]


@pytest.fixture(scope="module")
def truth(checkpoint, tmp_path_factory) -> dict:
    """Both sources apart, sample by sample on one rank, from plain logits."""
    found = on_ranks(1, RANKS, "by_hand", run_dir=str(tmp_path_factory.mktemp("truth") / "run"), checkpoint=checkpoint)[0]
    return {key: _whole(value) if isinstance(key, tuple) else value for key, value in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mixed_gradient_is_the_mixture_of_both_computed_apart(layout, checkpoint, truth, tmp_path):
    """(1 - mu) x gradient of GRPO alone + mu x gradient of SFT-phi alone; log-probabilities, too, are those of each sample by itself."""
    size, overrides = LAYOUTS[layout]
    ranks = on_ranks(size, RANKS, "mixed_gradients", overrides=overrides | {"run_dir": tmp_path / "run"}, checkpoint=checkpoint, cases=CASES)
    assert len({rank["micro_batches"] for rank in ranks}) == 1
    for case in CASES:
        expert, rollout, _ = case
        true = {key: MU * g + (1 - MU) * truth["rollout", rollout][key] for key, g in truth["expert", expert].items()}
        objective = MU * truth["objective"]["expert", expert] + (1 - MU) * truth["objective"]["rollout", rollout]
        seen = {key: whole.new_zeros(whole.shape) for key, whole in true.items()}
        for rank in ranks:
            means, gradients = rank[case]
            assert means == ranks[0][case][0], "every rank reports the same"
            assert means["lm loss"] == pytest.approx(objective, rel=1e-5)
            _check_metrics(means, truth)
            for key, _, offset, part in gradients:
                place = _at(offset, part.shape)
                seen[key][place] = 1
                assert _distance(part, true[key][place]) <= tol.LAYOUT_GRAD, (case, key)
        assert all(x.all() for x in seen.values())
    _check_scores(ranks, truth)


def _check_scores(ranks: list[dict], truth: dict) -> None:
    """Every sample scored somewhere, wherever it is scored alike; and what the training forward computes is what `score` said."""
    found = {}
    for rank in ranks:
        for source, logp, entropy in rank["scores"]:
            kept = found.setdefault(source, (logp, entropy))
            assert (kept[0] - logp).abs().max() <= 2e-6 and (kept[1] - entropy).abs().max() <= 2e-6, "ranks of a replica have one answer"
    for number, sample in enumerate(samples()):
        logp, entropy = found.pop(sample.source)
        assert (logp - truth["logp"][number]).abs().max() <= 1e-5 and (entropy - truth["entropy"][number]).abs().max() <= 1e-5, sample.source
    assert not found
    for rank in ranks:  # bit for bit: the same rows go through the same products
        assert rank["again"]["logp_diff_max"] == 0 and rank["again"]["k3"] == 0 and rank["again"]["ratio_mean"] == 1
        assert math.isclose(rank["again"]["rollout_nll"], _mean_nll(truth, expert=False), rel_tol=1e-5)
        assert math.isclose(rank["again"]["expert_nll"], _mean_nll(truth, expert=True), rel_tol=1e-5)


def _mean_nll(truth: dict, *, expert: bool) -> float:
    kept = [(truth["logp"][i], s.labels_T >= 0) for i, s in enumerate(samples()) if bool(s.columns["expert"].any()) == expert]
    return -sum(float(logp[live].sum()) for logp, live in kept) / sum(int(live.sum()) for _, live in kept)


def _check_metrics(means: dict, truth: dict) -> None:
    """Each source by its own tokens, written out from the log-probabilities that the logits gave."""
    found = {True: [], False: []}
    for number, sample in enumerate(samples()):
        expert = bool(sample.columns["expert"].any())
        for t in (sample.labels_T >= 0).nonzero()[:, 0].tolist():
            logp, columns = float(truth["logp"][number][t]), {name: float(values[t]) for name, values in sample.columns.items()}
            found[expert].append((logp, float(truth["entropy"][number][t]), columns))
    assert (means["expert_tokens"], means["rollout_tokens"]) == (len(found[True]), len(found[False])) and means["num_tokens"] == sum(map(len, found.values()))
    for name, expert in (("expert", True), ("rollout", False)):
        n = len(found[expert])
        assert means[f"{name}_nll"] == pytest.approx(-sum(logp for logp, *_ in found[expert]) / n, rel=1e-5)
        assert means[f"{name}_entropy"] == pytest.approx(sum(h for _, h, _ in found[expert]) / n, rel=1e-5)
    phi = [math.exp(logp) * (1 - math.exp(logp)) for logp, *_ in found[True]]
    assert means["expert_weight_mean"] == pytest.approx(sum(phi) / len(phi), rel=1e-5)
    assert means["expert/phi"] == pytest.approx(sum(phi) / len(phi), rel=1e-5)
    assert means["rollout_weight_mean"] == 1
    rollouts = [(logp, math.exp(logp - c["old_logp"]), c["advantage"], c["rollout_logp"]) for logp, _, c in found[False]]
    clipped = sum(ratio > 1.2 if advantage > 0 else not 0.8 <= ratio <= 3 for _, ratio, advantage, _ in rollouts)
    assert means["clip_frac"] == means["rollout/clip_frac"] == pytest.approx(clipped / len(rollouts)) and 0 < clipped < len(rollouts)
    assert means["ratio_mean"] == pytest.approx(sum(ratio for _, ratio, *_ in rollouts) / len(rollouts), rel=1e-5)
    differences = [logp - sampled for logp, *_, sampled in rollouts]
    assert means["k3"] == pytest.approx(sum(math.expm1(d) - d for d in differences) / len(rollouts), rel=1e-5)
    assert means["logp_diff_max"] == pytest.approx(max(map(abs, differences)), rel=1e-5)


@pytest.mark.parametrize("size, overrides", [(1, {}), (2, {}), (2, {"parallel.pipeline": 2, "data.packing": "false"})], ids=["TP1", "DP2", "PP2, not packed"])
def test_a_source_without_a_share_leaves_no_bit_behind(size, overrides, checkpoint, tmp_path):
    for found in on_ranks(size, RANKS, "alone", overrides=overrides | {"run_dir": tmp_path / "run"}, checkpoint=checkpoint):
        assert found == {"mu=0": True, "mu=0, other source": 0, "mu=1": True, "mu=1, other source": 0}


@pytest.mark.parametrize("size, overrides", [(1, {"train.micro_batch": 2}), (2, {"parallel.context": 2}), (2, {})], ids=["TP1", "CP2", "DP2"])
def test_with_mixture_of_experts_the_step_is_divided_by_all_tokens_and_nothing_else_changes(size, overrides, checkpoint, tmp_path):
    """N is what megatron-core's router expects (parallel/README.md); the loss, its gradient and every mean stay."""
    for found in on_ranks(size, RANKS, "divided_by_all", overrides=overrides | {"run_dir": tmp_path / "run"}, checkpoint=checkpoint):
        assert found["N"][0] == found["N"][1], "padding is routed too"
        for (means, gradients), (moe_means, moe_gradients) in zip(found["loss tokens"], found["all tokens"], strict=True):
            assert moe_means == pytest.approx(means, rel=1e-6, nan_ok=True)
            assert all(_distance(b, a) <= tol.LAYOUT_GRAD for (*_, a), (*_, b) in zip(gradients, moe_gradients, strict=True))


@pytest.mark.parametrize("loss, temperature", [("chord", 1.0), ("chord", 0.5)])
def test_held_out_rows_need_no_column_and_no_temperature(loss, temperature, checkpoint, truth, tmp_path):
    for means in on_ranks(2, RANKS, "held_out", overrides={"run_dir": tmp_path / "run", "parallel.pipeline": 2}, checkpoint=checkpoint, loss=loss,
                          temperature=temperature):  # fmt: skip
        live = [(truth["logp"][i], s.labels_T >= 0) for i, s in enumerate(samples())]
        assert means["num_tokens"] == sum(int(m.sum()) for _, m in live)
        assert means["nll"] == pytest.approx(-sum(float(logp[m].sum()) for logp, m in live) / means["num_tokens"], rel=1e-5)


@pytest.mark.parametrize("size, overrides, micro_batches", [(1, {}, 1), (4, {"parallel.pipeline": 2, "parallel.virtual": 2}, 2)], ids=["TP1", "PP2xVPP2xDP2"])
def test_a_step_without_samples_runs_and_changes_nothing(size, overrides, micro_batches, tmp_path):
    for means, found, scores, largest in on_ranks(size, RANKS, "nobody_has_a_sample", overrides=overrides | {"run_dir": tmp_path / "run"}):
        assert (found, scores, largest) == (micro_batches, [], 0) and means["num_tokens"] == means["expert_tokens"] == means["rollout_tokens"] == 0
        assert math.isnan(means["expert_nll"]) and math.isnan(means["rollout_nll"])


def test_a_sample_longer_than_a_row_is_an_error_on_every_rank(tmp_path):
    for said in on_ranks(2, RANKS, "too_long", overrides={"run_dir": tmp_path / "run"}):
        assert said.startswith("long:1: too long (got 17 tokens, expected at most 16)")


def test_columns_put_in_later():
    rows = pack_samples(samples(), 16, pad_id=0)
    mixed = MixedRows(rows, (tuple(range(len(rows))),))
    values = [torch.arange(len(s.tokens_T)) + 100.0 * i for i, s in enumerate(mixed.samples)]
    got = mixed.with_columns("ref_logp", values)
    assert got.rows.rows == rows.rows and got.rows.columns == ("advantage", "expert", "old_logp", "ref_logp", "rollout_logp")
    assert all(torch.equal(s.columns["ref_logp"], x) and "expert" in s.columns for s, x in zip(got.samples, values, strict=True))
    assert "ref_logp" in got.batches()[0].columns and "ref_logp" not in mixed.batches()[0].columns
    with pytest.raises(ValueError, match="column 'ref_logp': got 1 tensors, expected one for each of the 9 samples"):
        mixed.with_columns("ref_logp", values[:1])
    with pytest.raises(ValueError, match="got column 'ref_logp' of shape"):
        mixed.with_columns("ref_logp", [x[1:] for x in values])


def test_columns_become_inputs_of_a_loss():
    one, half = torch.ones(2, 3), torch.full((2, 3), 0.5)
    plain = dict.fromkeys(("tokens", "labels", "position_ids", "segment_ids"), torch.zeros(2, 3, dtype=torch.int64))
    batch = PackedBatch(**plain, loss_weight=one, columns={"expert": one, "advantage": half, "reward": half, "sequence": one})
    inputs = token_inputs(batch, half)
    assert inputs.expert.dtype == torch.bool and inputs.expert.all() and inputs.coefficient is half and inputs.advantage is half
    assert set(inputs.extra) == {"reward", "sequence"} and inputs.old_logp is None and inputs.extra["reward"] is half


def test_a_step_of_nothing_is_refused():
    with pytest.raises(ValueError, match="share 0 for expert and rollout tokens"):
        train_mixed(None, [], None, None, expert=Source(share=0), rollout=Source(share=0), names=[])
