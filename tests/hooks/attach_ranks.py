"""What the rank processes of test_attach.py run: losses attached to real GPTModels."""

from __future__ import annotations

import functools

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_plugin import Head, Plan, TokenInputs, attach, token_loss
from megatron_plugin.hooks.local_spec import local_block_spec
from tests.hooks.ranks import PADDED, SEQUENCE, VOCABULARY, batch_of, config_of, megatron


def _gpt(config, *, mtp=False, tied=False, **fields) -> GPTModel:
    spec = local_block_spec(config)
    fields |= {"mtp_block_spec": get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)} if mtp else {}
    model = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=PADDED, max_sequence_length=SEQUENCE, position_embedding_type="rope",
        share_embeddings_and_output_weights=tied, **fields,
    )  # fmt: skip
    for p in model.parameters():
        p.data.mul_(8.0 if p.dim() > 1 else 1.0)  # probabilities that differ
    return model


def _call(model, rank=0, **kwargs):
    tokens, labels, mask = batch_of(rank)
    return model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None, **({"labels": labels, "loss_mask": mask} | kwargs))


def _gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _backward(model, per_token, upstream) -> dict[str, torch.Tensor]:
    model.zero_grad()
    per_token.backward(upstream)
    return _gradients(model)


def sft_against_stock(group, *, tied=False, mtp=False) -> dict:
    """Ten lines of somebody else's script, before, with and after an attached sft: (per-token loss, gradients) each, and what the model is."""
    with megatron(group.size()):
        config = config_of(group.size(), **({"mtp_num_layers": 1} if mtp else {}))
        model = _gpt(config, tied=tied, mtp=mtp)
        torch.manual_seed(3)
        upstream = torch.randn(2, SEQUENCE)
        mask = batch_of(0)[2]
        look = lambda: (list(model.state_dict()), list(model.sharded_state_dict()), type(model.output_layer), sorted(vars(model)),  # noqa: E731
                        sorted(vars(model.output_layer)), len(model._forward_hooks), len(model._forward_pre_hooks), len(list(model.parameters())))  # fmt: skip
        found = {"before": look()}
        runs = {}
        for when in ("before", "with", "after"):
            handle = attach(model, "sft") if when == "with" else None
            if handle:
                found["keys"] = look()[:2]
            loss = _call(model)
            runs[when] = ((loss * mask).detach(), _backward(model, loss, upstream * mask))
            if handle:
                found["logits"] = _call(model, labels=None).detach() if not mtp else None
                handle.detach()
                handle.detach()
        found["after"] = look()
        found["stock logits"] = _call(model, labels=None).detach() if not mtp else None
        return found | {"runs": runs}


def two_pass(group, *, loss, params=None, head=None, fields=None, bias=False, grad_inputs=False) -> tuple:
    """(attached per-token loss, gradients; the same from the whole logits with token_loss), under a random upstream gradient."""
    with megatron(group.size()):
        model = _gpt(config_of(group.size(), **(fields or {})))
        if bias:
            layer = model.output_layer
            layer.bias = torch.nn.Parameter(torch.randn(layer.output_size_per_partition, generator=torch.Generator().manual_seed(9)))
        tokens, labels, mask = batch_of(0)
        torch.manual_seed(4)
        upstream = torch.randn(2, SEQUENCE)
        inputs = TokenInputs(advantage=torch.randn(2, SEQUENCE), old_logp=-3.6 + 0.3 * torch.randn(2, SEQUENCE)) if grad_inputs else TokenInputs()
        handle = attach(model, loss, head=head, plan=Plan(chunk_tokens=5), **(params or {}))
        with handle.inputs(inputs):
            per_token = _call(model)
        ours = per_token.detach(), _backward(model, per_token, upstream), handle.output
        handle.detach()
        logits = _call(model, labels=None)
        softcap = head and head.softcap
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        # per-token gradient under any upstream: weight each token by the upstream through the coefficient
        coefficient = upstream * mask
        out = token_loss(
            logits, labels, loss if not params else _bound(loss, params), tp_group=group, vocab_size=head and head.vocab_size,
            inputs=TokenInputs(coefficient=coefficient, advantage=inputs.advantage, old_logp=inputs.old_logp), temperature=head.temperature if head else 1.0,
        )  # fmt: skip
        model.zero_grad()
        out.loss_sum.backward()
        return ours[0], ours[1], out.per_token.loss, _gradients(model), float((ours[0] * upstream).sum()), float(out.loss_sum)


def _bound(loss, params):
    from megatron_plugin import bind

    return bind(loss, **params)


def masks(group) -> dict:
    """A loss_mask with data weights, and a coefficient, in both ways; [b, s] losses or sums."""
    with megatron(1):
        model = _gpt(config_of(1))
        tokens, labels, mask = batch_of(0)
        weights = mask * torch.linspace(0.5, 2.0, SEQUENCE)
        found = {}
        handle = attach(model, "dft")
        found["plain"] = _call(model, loss_mask=None).detach()
        found["masked"] = _call(model, loss_mask=weights).detach()
        found["two_pass sum"] = handle.loss_func(_call(model, loss_mask=weights))
        with handle.inputs(TokenInputs(coefficient=weights)):
            found["coefficient"] = _call(model, loss_mask=None).detach()
        with handle.inputs(TokenInputs(coefficient=weights)):
            found["two_pass both"] = handle.loss_func(_call(model, loss_mask=weights))
        handle.detach()
        handle = attach(model, "dft", one_pass=True)
        found["one_pass sum"] = handle.loss_func(_call(model, loss_mask=weights))
        with handle.inputs(TokenInputs(coefficient=weights), on_host=weights):
            found["one_pass coefficient"] = handle.loss_func(_call(model, loss_mask=None))
        with handle.inputs(TokenInputs(coefficient=weights)):
            found["one_pass both"] = handle.loss_func(_call(model, loss_mask=weights))
        with torch.no_grad():
            found["no grad"] = handle.loss_func(_call(model, loss_mask=weights))
        found["poisoned"] = handle.loss_func(_call(model, loss_mask=weights, labels=labels.masked_fill(mask == 0, VOCABULARY + 9999)))
        return {k: _plain(v) for k, v in found.items()} | {"weights": weights}


def _plain(value):
    return (value[0].detach(), value[1], value[2]) if isinstance(value, tuple) else value


class _OwnForward(ColumnParallelLinear):
    def forward(self, input_, weight=None, runtime_gather_output=None):
        out, bias = super().forward(input_, weight, runtime_gather_output)
        return 30.0 * torch.tanh(out / 30.0), bias


class _Adapter(torch.nn.Module):
    def __init__(self, wrapped):
        super().__init__()
        self.to_wrap = wrapped


class _Quantised(torch.Tensor):
    """Stands for Transformer Engine's Float8Tensor, a tensor subclass, which needs a GPU."""


def refusals(group) -> dict[str, str]:
    """{case: the text of its error}."""
    with megatron(1):
        cases = {
            "twice": lambda m: (attach(m, "sft"), attach(m, "dft")),
            "adapter": lambda m: (setattr(m, "output_layer", _Adapter(m.output_layer)), attach(m, "sft")),
            "own forward": lambda m: (setattr(m.output_layer, "__class__", _OwnForward), attach(m, "sft")),
            "fp8": lambda m: (setattr(m.output_layer, "weight", torch.nn.Parameter(m.output_layer.weight.detach().as_subclass(_Quantised))), attach(m, "sft")),
            "deferred": lambda m: (setattr(m.config, "defer_embedding_wgrad_compute", True), attach(m, "sft")),
            "bias given": lambda m: attach(m, "sft", head=Head(bias=torch.zeros(PADDED))),
            "rows given": lambda m: attach(m, "sft", plan=Plan(rows=torch.arange(3))),
            "vocabulary": lambda m: attach(m, "sft", head=Head(vocab_size=PADDED + 1)),
            "flag": lambda m: (setattr(m.config, "calculate_per_token_loss", False), attach(m, "sft", one_pass=True)),
            "unknown loss": lambda m: attach(m, "dtf"),
            "unknown parameter": lambda m: attach(m, "idft", gama=1.0),
            "not a model": lambda m: attach(torch.nn.Linear(2, 2), "sft"),
            "loss_func twice": lambda m: _loss_func_twice(attach(m, "sft"), m),
            "second forward": lambda m: _second_forward(attach(m, "sft"), m),
            "inputs without labels": lambda m: _inputs_without_labels(attach(m, "sft"), m),
            "nobody divides": lambda m: (setattr(m.config, "finalize_model_grads_func", None), _loss_func(attach(m, "sft"), m)),
            "instance forward": lambda m: (setattr(m.output_layer, "forward", m.output_layer.forward), attach(m, "sft")),
            "forward replaced later": lambda m: (attach(m, "sft"), setattr(m.output_layer, "forward", functools.partial(ColumnParallelLinear.forward, m.output_layer)), _call(m)),
            "two heads": lambda m: attach([m, _gpt(config_of(1))], "sft"),
            "piecewise": lambda m: (attach(m, "sft"), m.compute_language_model_loss(torch.zeros(1, 1), torch.zeros(1, 1, 4))),
            "mask": lambda m: (attach(m, "sft"), _call(m, labels=batch_of(0)[1][:, :-1])),
            "shape": lambda m: (attach(m, "sft"), _call(m, labels=batch_of(0)[1][:, :-1], loss_mask=None)),
            "transposed": lambda m: (attach(m, "sft"), _call(m, labels=batch_of(0)[1].t(), loss_mask=None)),
            "flat advantage": lambda m: _inputs(attach(m, "grpo"), m, advantage=torch.ones(2 * SEQUENCE)),
            "transposed advantage": lambda m: _inputs(attach(m, "grpo"), m, advantage=torch.ones(SEQUENCE, 2)),
            "one advantage": lambda m: _inputs(attach(m, "grpo"), m, advantage=torch.ones(1, 1)),
            "flat advantage, one-pass": lambda m: _inputs(attach(m, "grpo", one_pass=True), m, advantage=torch.ones(2 * SEQUENCE)),
            "host mask": lambda m: _inputs(attach(m, "sft"), m, on_host=torch.ones(SEQUENCE, 2)),
            "no inputs": lambda m: attach(m, "sft").inputs({}).__enter__(),
            "nested inputs": lambda m: _nested(attach(m, "sft")),
            "detached": lambda m: _detached(attach(m, "sft"), m),
            "other output": lambda m: (h := attach(m, "sft", one_pass=True), _call(m), h.loss_func(torch.zeros(2, SEQUENCE))),
            "no chunks": lambda m: attach([], "sft"),
            "head type": lambda m: attach(m, "sft", head=37),
            "vocabulary type": lambda m: attach(m, "sft", head=Head(vocab_size="37")),
        }
        found = {}
        for name, case in cases.items():
            try:
                found[name] = f"no error: {case(_gpt(config_of(1)))}"
            except (ValueError, RuntimeError) as error:
                found[name] = f"{type(error).__name__}: {error}"
        return found


def _inputs(handle, model, on_host=None, **fields):
    with handle.inputs(TokenInputs(**fields), on_host=on_host):
        return _call(model)


def _nested(handle):
    with handle.inputs(TokenInputs()), handle.inputs(TokenInputs()):
        return handle


def _detached(handle, model):
    out = _call(model)
    handle.detach()
    return handle.loss_func(out)


def _loss_func(handle, model):
    return handle.loss_func(_call(model))


def _loss_func_twice(handle, model):
    out = _call(model)
    return handle.loss_func(out), handle.loss_func(out)


def _second_forward(handle, model):
    with handle.inputs(TokenInputs()):
        return _call(model), _call(model)


def _inputs_without_labels(handle, model):
    with handle.inputs(TokenInputs()):
        return _call(model, labels=None)


def stages(group) -> tuple[bool, str, list[str]]:
    """On two pipeline stages: (active, its repr, attributes that attach added to this stage's model)."""
    from megatron_plugin.hooks.cpu_platform import cpu_platform

    with cpu_platform():
        parallel_state.initialize_model_parallel(1, 2)
        try:
            from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

            model_parallel_cuda_manual_seed(7)
            config = config_of(1, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
            first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
            model = _gpt(config, pre_process=first, post_process=last)
            before = set(vars(model))
            handle = attach(model, "dft")
            added = sorted(set(vars(model)) - before)
            with handle.inputs(TokenInputs()):
                pass
            found = handle.active, repr(handle), added
            handle.detach()
            return found
        finally:
            parallel_state.destroy_model_parallel()


def readme(group, *, source: str) -> tuple[float, int, float, int]:
    """(sum, tokens) from the README's forward_step, and what the whole logits give."""
    with megatron(group.size()):
        namespace = {"model": _gpt(config_of(group.size()))}
        exec(source, namespace)
        tokens, labels, mask = batch_of(0)
        batch = dict(tokens=tokens, position_ids=torch.arange(SEQUENCE).expand_as(tokens), labels=labels, loss_mask=mask)
        output, loss_func = namespace["forward_step"](iter([batch]), namespace["model"])
        loss_sum, num_tokens, _ = loss_func(output)
        logits = _call(namespace["model"], labels=None)
        true = token_loss(logits, labels, "dft", tp_group=group, vocab_size=VOCABULARY, inputs=TokenInputs(coefficient=mask))
        return float(loss_sum), int(num_tokens), float(true.loss_sum), int(true.num_tokens)
