"""The loss on the logits of a model that FSDP2 shards; with --tensor the output head is a DTensor, cut over the vocabulary.

    torchrun --nproc-per-node 2 examples/fsdp2.py             # parameters cut over the ranks, rows too
    torchrun --nproc-per-node 2 examples/fsdp2.py --tensor    # the head's columns cut over the ranks, which share the rows
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from megatron_plugin import TokenInputs, token_loss

VOCABULARY, ROWS, LENGTH = 1000, 8, 32


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 64)
        self.body = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        self.head = torch.nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def main(tensor: bool, steps: int = 5, loss: str = "chord_phi") -> list[float]:
    """The loss of each step, the same however the model is cut."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Model().to(device)
    if tensor:
        parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    else:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)  # plain parameters and DTensors in one list
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=draw).to(device)
        mask = (torch.rand(ROWS, LENGTH, generator=draw) < 0.7).float().to(device)
        if not tensor:  # data parallel: each rank its rows, which hold unequal numbers of trained tokens
            mine = slice(dist.get_rank(), None, dist.get_world_size())
            rows, mask = rows[mine], mask[mine]
        logits = model(rows[:, :-1])
        where = dict(tp_group=mesh.get_group(), vocab_size=VOCABULARY) if tensor else {}
        local = logits.to_local() if tensor else logits  # [rows, length, columns of this rank]
        out = token_loss(local, rows[:, 1:], loss, inputs=TokenInputs(coefficient=mask), **where)
        total = torch.stack([out.loss_sum.detach(), out.num_tokens.float()])
        if not tensor:
            dist.all_reduce(total)
        ranks = 1 if tensor else dist.get_world_size()
        optimizer.zero_grad()
        (out.loss_sum * ranks / total[1]).backward()  # FSDP averages gradients over ranks; tokens of the whole step are what to divide by
        optimizer.step()
        losses.append(float(total[0] / total[1]))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor", action="store_true")
    chosen = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = main(chosen.tensor)
    if dist.get_rank() == 0:
        print(" ".join(f"{value:.6f}" for value in found))
    dist.destroy_process_group()
