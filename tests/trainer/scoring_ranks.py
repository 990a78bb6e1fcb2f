"""What the rank processes of test_scoring.py run."""

import contextlib
import io
from pathlib import Path

import torch

from megatron_plugin.trainer import scoring


def score(group, *, data: str, model: str, out: str, window: int = 128, samples: int = 0, overrides: tuple[str, ...] = ()) -> str:
    """What `megatron-plugin score` prints; `window`: lines that a data-parallel rank takes at a time."""
    before, scoring.WINDOW = scoring.WINDOW, window
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            task = scoring.Task(Path(data), Path(out), samples=samples, rows=2)
            scoring.score_with_checkpoint(task, model, overrides, world_size=group.size())
    finally:
        scoring.WINDOW = before
    return said.getvalue()


def dense(group, *, data: str, model: str) -> list[tuple[float, float]]:
    """(mean log p, mean cll) of each sample in fp64 from the logits that the model gives without labels, one sample a row."""
    from megatron_plugin.data import ConversationEncoder, iter_lines, load_tokenizer
    from megatron_plugin.trainer.checkpoint import find_checkpoint, load_checkpoint, read_state
    from megatron_plugin.trainer.convert import empty_model, layout_config
    from megatron_plugin.trainer.hf_model import run_values
    from megatron_plugin.trainer.world import world

    run, found = Path(model), []
    values, checkpoint = run_values(run), find_checkpoint(run)
    config = layout_config({"model": values["model"], "train": {"dtype": "fp32"}, "data": {"seq_length": 64, "packing": False}}, (), 1, settable=())
    encoder, size = ConversationEncoder(load_tokenizer(run / "tokenizer")), read_state(checkpoint)["vocab_size"]
    with contextlib.redirect_stdout(io.StringIO()), world(config):
        (chunk,) = empty_model(config, size)
        load_checkpoint(checkpoint, [chunk])
        for item in iter_lines(data):
            sample = encoder.encode(item)
            ids = sample.tokens_T[None]
            with torch.no_grad():
                log_p = chunk.eval()(ids, torch.arange(ids.shape[1])[None], None)[0, :-1, :size].double().log_softmax(-1)
            live = sample.labels_T[1:] != -100
            logp = log_p.gather(-1, sample.tokens_T[1:, None])[live, 0]
            found.append((float(logp.mean()), float((logp - (log_p.exp() * log_p).sum(-1)[live]).mean())))
    return found


def windows(group, *, data: str) -> tuple[list[int], int, list[list[int]]]:
    """(lines of the first window behind line 4, how many lines of the data were read for it, the windows after it) with windows of 3, up to line 11."""
    read, originals = [], (scoring.iter_lines, scoring.WINDOW)
    scoring.iter_lines, scoring.WINDOW = (lambda *_, **__: (read.append(n) or n for n in range(10**9))), 3
    try:
        one = object.__new__(scoring._Scoring)
        one.task, one.train_on, one.ranks = scoring.Task(Path(data), Path("x"), samples=11), "all", scoring._Alone()
        rest = one._windows(4)
        first, seen = [line for line, _ in next(rest)], len(read)
        return first, seen, [[line for line, _ in window] for window in rest]
    finally:
        scoring.iter_lines, scoring.WINDOW = originals
