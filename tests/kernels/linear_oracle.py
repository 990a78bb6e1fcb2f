"""The hidden-in ops in their shortest form: dense logits and autograd, in fp64 unless told otherwise.  Inputs with every field a loss can ask for."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_plugin import Head, LossOutput, TokenInputs, TokenStats, bind
from megatron_plugin.kernels.reference import token_stats_reference
from megatron_plugin.losses.reduction import evaluate_loss

MASKED = -100


def problem(T: int = 37, H: int = 24, V: int = 101, *, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, TokenInputs]:
    """hidden [T, H], weight [V, H], labels [T] and inputs; tokens 2 and 5 masked, by label and by coefficient.  p from 1e-7 to 0.98."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (T,), generator=g)
    hidden[::2] += 0.6 * weight[labels][::2]  # half of the labels are likely
    inputs = TokenInputs(
        coefficient=torch.rand(T, generator=g) + 0.5,
        advantage=torch.randn(T, generator=g),
        old_logp=-8 * torch.rand(T, generator=g),
        expert=torch.rand(T, generator=g) < 0.5,
    )
    if T > 5:
        labels[2], inputs.coefficient[5] = MASKED, 0.0
    return hidden.to(dtype), (0.5 * weight).to(dtype), labels, inputs


def logits_of(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    z = hidden @ weight.t()
    z = z if head.bias is None else z + head.bias.to(z.dtype)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense(hidden, weight, labels, loss, *, inputs=None, head=None, dtype=torch.float64) -> tuple[LossOutput, dict[str, Tensor]]:
    """LossOutput and gradients of hidden, weight and bias through the full logits in `dtype`; statistics in at least fp32."""
    head, inputs = head or Head(), inputs or TokenInputs()
    live = labels != MASKED
    live = live if inputs.coefficient is None else live & (inputs.coefficient != 0)
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in (("hidden", hidden), ("weight", weight), ("bias", head.bias)) if x is not None}
    at = Head(leaves.get("bias"), head.softcap, head.temperature, head.vocab_size)
    z = logits_of(torch.where(live[..., None], leaves["hidden"], 0.0), leaves["weight"], at)
    work = torch.promote_types(dtype, torch.float32)
    masked = labels.masked_fill(~live, MASKED)
    stats = token_stats_reference(z, masked, vocab_size=head.vocab_size, temperature=head.temperature, dtype=work)
    flat = TokenStats(*(x.reshape(-1) for x in stats))
    wide = inputs.map(lambda x: x.reshape(-1).to(work) if x.is_floating_point() else x.reshape(-1))
    out = evaluate_loss(bind(loss).for_vocabulary(head.vocab_size or weight.shape[0]), flat, wide, live.reshape(-1))
    grads = torch.autograd.grad(out.loss_sum, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return out, dict(zip(leaves, grads, strict=True))


def leaf(x: Tensor, device="cpu") -> Tensor:
    """A leaf of its own on the device."""
    return x.detach().clone().to(device).requires_grad_()


def distance(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||, and ||got|| where the truth is 0."""
    got, truth = got.detach().cpu().double(), truth.detach().cpu().double()
    return float((got - truth).norm() / (truth.norm() or 1.0))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, views of `but` aside."""

    def __init__(self, but: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.but, self.largest = {x.untyped_storage().data_ptr() for x in but}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.layout == torch.strided and x.untyped_storage().data_ptr() not in self.but:
                self.largest = max(self.largest, x.numel())
        return out


class GemmFlop(TorchDispatchMode):
    """2 m n k of every matrix product (torch's counter leaves out addmm_)."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "mm_fp32_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))
