"""What run.py starts with verl on the Python path: our functions inside verl's own registry, ppo_loss and sft_loss, on real tensors.

Prints one line of JSON, as parity.py does.
"""

from __future__ import annotations

import inspect
import json
import traceback
import warnings

import torch

warnings.simplefilter("ignore")
# ruff: noqa: E402
import verl
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig
from verl.workers.utils import losses

from megatron_plugin.hooks.dropins.verl import engine_loss, policy_loss
from tests.tolerances import DROPIN_VERL

LENGTHS = (5, 7)  # tokens of two samples, prompt and response


def policy_signature():
    """The parameters by which verl calls a policy loss."""
    theirs = list(inspect.signature(core_algos.compute_policy_loss_vanilla).parameters)
    ours = list(inspect.signature(policy_loss("grpo")).parameters)
    assert ours == theirs, f"verl takes {theirs}"
    return f"ok, ({', '.join(theirs)})"


def engine_signature():
    theirs = list(inspect.signature(losses.sft_loss).parameters)
    assert list(inspect.signature(engine_loss("sft")).parameters) == theirs, theirs
    return f"ok, ({', '.join(theirs)})"


def policy_case():
    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(4, 6, generator=generator)
    return dict(
        old_log_prob=old, log_prob=(old + 0.4 * torch.randn(4, 6, generator=generator)).requires_grad_(),
        advantages=torch.randn(4, 6, generator=generator), response_mask=torch.rand(4, 6, generator=generator) > 0.3,
        rollout_is_weights=torch.rand(4, 6, generator=generator),
    )  # fmt: skip


def registered(mode):
    """Our grpo through verl's registry against verl's own vanilla loss: value and gradient, in one aggregation mode."""
    core_algos.register_policy_loss("ours")(policy_loss("grpo", clip_low=0.2, clip_high=0.3))
    config = actor()
    config.global_batch_info.update(dp_size=2, batch_num_tokens=31, global_batch_size=9, loss_scale_factor=None)
    answers = []
    for name in ("ours", "vanilla"):
        case = policy_case()
        loss, metrics = core_algos.get_policy_loss_fn(name)(**case, loss_agg_mode=mode, config=config)
        loss.backward()
        answers.append((float(loss), case["log_prob"].grad, metrics))
    (ours, our_grad, metrics), (theirs, their_grad, _) = answers
    assert abs(ours - theirs) <= DROPIN_VERL * abs(theirs) and their_grad.norm() > 0.01, (ours, theirs)
    error = float((our_grad - their_grad).norm() / their_grad.norm())
    assert error <= DROPIN_VERL and {"actor/ratio", "actor/clip_frac"} == set(metrics), (error, metrics)
    return f"ok, loss {abs(ours - theirs) / abs(theirs):.0e}, gradient {error:.0e}"


def actor(**fields):
    return ActorConfig(strategy="megatron", rollout_n=1, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0,
                       ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=2, **fields)  # fmt: skip


def engine_case():
    """Two samples as the engine's no-padding batches hold them: nested, with prompts of 2 tokens masked."""
    nested = lambda parts: torch.nested.as_nested_tensor(parts, layout=torch.jagged)  # noqa: E731
    generator = torch.Generator().manual_seed(2)
    logp = [(-torch.rand(n, generator=generator)).requires_grad_() for n in LENGTHS]
    entropy = [torch.rand(n, generator=generator) for n in LENGTHS]
    masks = [(torch.arange(n) >= 2).float() for n in LENGTHS]
    data = {"loss_mask": nested(masks), "dp_size": 2, "batch_num_tokens": 11}
    return {"log_probs": nested(logp), "entropy": nested(entropy)}, data, logp


def engine_sft():
    """engine_loss("sft") against verl's sft_loss: value and gradient."""
    answers = []
    for function in (engine_loss("sft"), losses.sft_loss):
        output, data, logp = engine_case()
        loss, _ = function(None, output, data)
        loss.backward()
        answers.append((float(loss), torch.cat([x.grad for x in logp])))
    (ours, our_grad), (theirs, their_grad) = answers
    assert abs(ours - theirs) <= DROPIN_VERL * abs(theirs) and torch.allclose(our_grad, their_grad, atol=DROPIN_VERL) and their_grad.any()
    return f"ok, loss {abs(ours - theirs) / abs(theirs):.0e}"


def engine_dft_by_hand():
    output, data, logp = engine_case()
    loss, _ = engine_loss("dft")(None, output, data)
    loss.backward()
    expected = 0.0
    for x in logp:  # position i predicts token i + 1, and the response begins at token 2
        p = x.detach().exp()[1:-1]
        expected += float(-(p * x.detach()[1:-1]).sum()) / 11 * 2
        want = torch.zeros_like(x)
        want[1:-1] = -p / 11 * 2
        assert torch.allclose(x.grad, want, atol=DROPIN_VERL)
    assert abs(float(loss) - expected) <= DROPIN_VERL
    return "ok"


def losses_of_the_entropy():
    output, data, _ = engine_case()
    loss, _ = engine_loss("eaft", vocab_size=100)(None, output, data)
    assert loss.isfinite() and float(loss) > 0
    del output["entropy"]
    for refused, message in [
        (lambda: engine_loss("idft")(None, output, data), "set calculate_entropy=True"),
        (lambda: policy_loss("idft"), "which verl does not give to its policy losses"),
        (lambda: engine_loss("grpo"), "needs inputs.advantage"),
    ]:
        try:
            refused()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")
    return "ok"


CHECKS = {
    "policy loss: signature": policy_signature,
    **{f"policy loss: grpo is vanilla, {mode}": lambda mode=mode: registered(mode)
       for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")},
    "engine loss: signature": engine_signature,
    "engine loss: sft is verl's": engine_sft,
    "engine loss: dft by hand": engine_dft_by_hand,
    "entropy: used, or refused": losses_of_the_entropy,
}  # fmt: skip


def main() -> None:
    results = {"version": verl.__version__}
    for name, check in CHECKS.items():
        try:
            results[name] = check()
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
