"""What the loss is worth in a whole step: forward and backward of a small megatron-core GPT with a large vocabulary, three heads.

The gain shrinks with the share of the body: `body alone` is the same model without head and loss.  No optimiser.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks._report import Report
from benchmarks._rival_tools import megatron_group
from benchmarks.rivals import megatron_nll, stats_lse
from megatron_plugin.bench.cases import objective_sum
from megatron_plugin.bench.harness import Contender, Run, Work
from megatron_plugin.bench.ours import bound

OBJECTIVE = "dft"
MICRO_BATCH = 4


@dataclass
class Step:
    """A model body, a head, tokens and labels, and the truth: an eager fp32 loss on full logits."""

    shape: shapes.Shape
    body: torch.nn.Module
    weight: torch.nn.Parameter
    tokens: Tensor
    labels: Tensor
    device: torch.device
    truth: dict[str, Tensor]

    @property
    def live(self) -> Tensor:
        return torch.ones_like(self.labels, dtype=torch.bool)

    def hidden(self) -> Tensor:
        """[T, H] of all tokens, in megatron-core's order [s, b]."""
        positions = torch.arange(self.tokens.shape[1], device=self.device).expand_as(self.tokens)
        return self.body(self.tokens, positions, None).flatten(0, 1)

    def probe(self) -> torch.nn.Parameter:
        """A parameter at the far end of the backward."""
        return next(p for name, p in self.body.named_parameters() if "layers.0" in name and p.dim() == 2)

    def expected(self, name: str) -> Tensor:
        return self.truth[name]

    def pick(self, name: str, output: Tensor) -> Tensor:
        return output

    def output_bytes(self) -> list[int]:
        return []


def build_step(shape: shapes.Shape, device: str, *, layers: int, heads: int) -> Step:
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    megatron_group()
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_plugin.hooks.local_spec import block_spec

    torch.manual_seed(shape.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(shape.seed)
    config = TransformerConfig(
        num_layers=layers, hidden_size=shape.H, num_attention_heads=heads, normalization="RMSNorm", add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, use_cpu_initialization=device == "cpu",
        masked_softmax_fusion=False,  # its kernels come with apex
    )  # fmt: skip
    S = shape.T // MICRO_BATCH
    body = GPTModel(
        config=config, transformer_layer_spec=block_spec(config), vocab_size=shape.V, max_sequence_length=S, position_embedding_type="rope",
        post_process=False,
    ).to(device)  # fmt: skip
    weight = torch.nn.Parameter((torch.randn(shape.V, shape.H, device=device) * 0.02).to(torch.bfloat16))
    weight.main_grad = torch.zeros(shape.V, shape.H, device=device)
    tokens, labels = torch.randint(shape.V, (2, MICRO_BATCH, S), device=device)
    step = Step(shape, body, weight, tokens, labels.t().reshape(-1), weight.device, {})
    step.truth |= {name: x.detach().clone() for name, x in with_logits(eager_loss)(step).call(None).items()}
    return step


def eager_loss(step: Step):
    return lambda logits: objective_sum(OBJECTIVE, stats_lse(logits, step.labels, 1.0)[0], None, step.live)


def megatron_loss(step: Step):
    nll_of = megatron_nll(fused=True)
    return lambda logits: objective_sum(OBJECTIVE, -nll_of(logits, step.labels), None, step.live)


def our_loss(step: Step):
    from megatron_plugin import token_loss

    loss = bound(OBJECTIVE)
    return lambda logits: token_loss(logits, step.labels, loss, overwrite_logits=True).loss_sum


def _outputs(step: Step, loss: Tensor) -> dict[str, Tensor]:
    """Backward, and what is compared: the loss and a gradient at the far end."""
    loss.backward()
    outputs = {"loss": loss, "dhidden": step.probe().grad}
    step.body.zero_grad(set_to_none=True)
    step.weight.grad = None
    return outputs


def with_logits(loss_of):
    def build(step: Step) -> Run:
        loss = loss_of(step)
        return Run(lambda _: _outputs(step, loss(step.hidden() @ step.weight.t())))

    return build


def hidden_in(step: Step) -> Run:
    from megatron_plugin import MainGrad, Plan, linear_token_loss

    loss, main_grad = bound(OBJECTIVE), MainGrad(step.weight)

    def call(_):
        out = linear_token_loss(step.hidden(), step.weight, step.labels, loss, plan=Plan(main_grad=main_grad))
        return _outputs(step, out.loss_sum)

    return Run(call, main_grad.finalize)


def body_alone(step: Step) -> Run:
    def call(_):
        step.hidden().sum().backward()
        step.body.zero_grad(set_to_none=True)
        return {}

    return Run(call)


CONTENDERS = [
    Contender("body alone", body_alone, "no head, no loss"),
    Contender("ours.linear_token_loss", hidden_in, "hidden-in, main_grad"),
    Contender("ours.token_loss", with_logits(our_loss), "full logits, gradient over them"),
    Contender("mcore.fused", with_logits(megatron_loss), "full logits, megatron-core's fused loss", slow_start=True),
    Contender("eager", with_logits(eager_loss), "full logits, autograd"),
]


def main() -> None:
    report = Report("training_step", __doc__)
    tiny = report.options.tiny
    try:
        from megatron_plugin.hooks.cpu_platform import cpu_platform
    except Exception as error:
        report.add([{"shape": "none", "held_out": False, "contender": "all", "ms": None, "reason": f"megatron-core is not importable ({error})"}])
        return
    with cpu_platform() if report.device == "cpu" else contextlib.nullcontext():
        for shape in report.shapes(shapes.TRAINING_STEP):
            step = build_step(shape, report.device, layers=2 if tiny else 4, heads=4 if tiny else 32)
            rows = report.compare(step, CONTENDERS, Work())
            for row in rows:
                row["tokens_per_s"] = shape.T / row["ms"] * 1e3 if row["ms"] else None
            report.save()


if __name__ == "__main__":
    main()
