"""dW of the head straight into `weight.main_grad`, the buffer that Megatron's DistributedDataParallel reduces, and the ledger of it.

The one-pass op adds to it in the forward, before anybody knows whether a backward will come and what it will bring.  The ledger counts.
"""

import torch
from torch import Tensor

from megatron_plugin.kernels.objective import Number

AGREE = 1e-5  # relative: two ways of forming one scale in fp32


class MainGrad:
    """The ledger of one weight; make one per weight and keep it, call `finalize()` before the optimiser's step.

    Every use of the weight in a step must go through main_grad: DDP's hook throws p.grad of a marked weight away, unless it is tied and
    megatron-core set zero_out_wgrad.  Without DDP a sparse p.grad of zeros stays behind; set it to None.  main_grad in bf16
    (grad_reduce_in_fp32=False) is rounded once per chunk, in fp32 never.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._pending = 0
        self._strangers: Tensor | None = None  # 0-d on the device: backwards whose upstream gradient was not grad_scale
        self._seen: Tensor | None = None  # 0-d on the device: upstream gradient of one of them
        self._expected: Tensor | None = None  # its grad_scale

    def target(self) -> Tensor:
        """`weight.main_grad`.  ValueError where there is none, or of another shape or device."""
        target = getattr(self.weight, "main_grad", None)
        if target is None:
            raise ValueError(
                "plan.main_grad: the weight has no main_grad; wrap the model in megatron-core's DistributedDataParallel first, which makes it, "
                "or leave plan.main_grad out for an ordinary gradient"
            )
        if target.shape != self.weight.shape or target.device != self.weight.device:
            raise ValueError(
                f"plan.main_grad: weight.main_grad is {list(target.shape)} on {target.device}, the weight {list(self.weight.shape)} on "
                f"{self.weight.device}; sharded gradient buffers (Megatron-FSDP) are not supported here: leave plan.main_grad out"
            )
        return target

    def forward_begins(self) -> None:
        """A forward adds its dW from now on; one that fails half-way stays on the books."""
        self._pending += 1

    def backward_done(self, upstream: Tensor, grad_scale: Number) -> None:
        """Its backward came, with this upstream gradient.  Compared on the device: nothing waits."""
        self._pending -= 1
        upstream = upstream.detach().float()
        expected = torch.zeros_like(upstream) + grad_scale  # a fill or an add: no copy from the host that a queue would wait for
        strange = ~((upstream - expected).abs() <= AGREE * expected.abs())
        if self._strangers is None or self._seen is None or self._expected is None:
            self._strangers = torch.zeros_like(upstream, dtype=torch.int32)
            self._seen, self._expected = torch.zeros_like(upstream), torch.zeros_like(upstream)
        self._strangers += strange
        self._seen = torch.where(strange, upstream, self._seen)
        self._expected = torch.where(strange, expected, self._expected)

    def placeholder(self) -> Tensor:
        """What a backward returns for the weight, so that its hooks run; marks the weight as already accumulated.

        Never None, on which overlapped reduction would wait for ever, and zeros, which megatron-core wants for tied weights (zero_out_wgrad:
        the embedding's gradient is added to it and then to main_grad).  A sparse tensor without entries is both, and needs no [V, H]
        memory, which ColumnParallelLinear's own placeholder does; p.grad is None again after DDP's hook.
        """
        weight = self.weight
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # what DDP's hook looks for
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device, layout=torch.sparse_coo)

    def reset(self) -> None:
        """Close the books unread: for a step that was given up half-way, with main_grad zeroed."""
        self._pending, self._strangers, self._seen, self._expected = 0, None, None, None

    def finalize(self) -> None:
        """Check a step's books and close them; waits for the device once.  Call after the last backward, before the optimiser's step.

        RuntimeError where forwards and backwards do not match, or a backward brought another scale than `plan.grad_scale`: main_grad
        then holds a wrong gradient and the step must not be taken.
        """
        pending, strangers, seen, expected = self._pending, self._strangers, self._seen, self._expected
        self.reset()
        if pending:
            raise RuntimeError(
                f"the head ran {pending} forward(s) without a backward, so main_grad holds gradients twice or of a loss nobody used: activation "
                "recompute of the head, or a loss that was dropped; use linear_token_stats (two-pass), or leave plan.main_grad out.  If the forward belonged to "
                "an earlier step that was given up and its gradients zeroed, call reset() there (attach: handle.forget_step())"
            )
        if strangers is not None and seen is not None and expected is not None and (count := int(strangers)):
            raise RuntimeError(
                f"{count} backward(s) of the head brought the upstream gradient {float(seen):g}, expected plan.grad_scale = {float(expected):g}, "
                "with which dW went into main_grad in the forward: pass the factor between loss_sum and the scalar that backward() starts from "
                "(loss scale / micro-batches, say) as Plan(grad_scale=...), or use linear_token_stats (two-pass)"
            )
