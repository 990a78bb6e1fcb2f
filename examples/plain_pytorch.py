"""The loss in a plain PyTorch loop: a bigram model that learns half of its rows.

    python examples/plain_pytorch.py [loss]
"""

import sys

import torch

from megatron_plugin import TokenInputs, token_loss


def main(loss: str = "dft", steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    vocabulary, text = 500, torch.arange(4096) * 7 % 500
    model = torch.nn.Sequential(torch.nn.Embedding(vocabulary, 64), torch.nn.Linear(64, vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    nll = []
    for _ in range(steps):
        start = torch.randint(0, len(text) - 65, (8,))
        rows = torch.stack([text[i : i + 65] for i in start])
        tokens, labels = rows[:, :-1], rows[:, 1:]
        mask = (torch.arange(64) >= 32).float().expand_as(labels)  # the prompt's half is not trained
        out = token_loss(model(tokens), labels, loss, inputs=TokenInputs(coefficient=mask))
        optimizer.zero_grad()
        (out.loss_sum / out.num_tokens).backward()  # one division per step, by the tokens of all micro-batches and ranks
        optimizer.step()
        nll.append(float(out.metric_sums["nll"] / out.num_tokens))
    return nll


if __name__ == "__main__":
    found = main(*sys.argv[1:2])
    print(f"NLL {found[0]:.3f} -> {found[-1]:.3f}")
