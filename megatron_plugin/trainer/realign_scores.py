"""How on-distribution the records of a realignment are for the model that wrote them.  vLLM gives no entropies, so the model reads them once more.

    OUT/scores.jsonl: line n is of the n-th record of realigned.jsonl (data/scores.py has the fields); a second start goes on where it ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from megatron_plugin.data import ConversationEncoder, parse_line, true_vocab_size
from megatron_plugin.data.scores import ScoreFile, read_scores, sample_score
from megatron_plugin.trainer.hf_scorer import HFScorer

__all__ = ["score_records", "scores_of_records"]

FIELDS = ("logp", "entropy", "cll")
WINDOW = 64
"""Records: what a kill loses."""


def score_records(outcomes: Path, model: Path, tokenizer: Any) -> None:
    """Scores of the records that have none yet, as training will read them.  ConfigError for a model that transformers cannot load."""
    with closing(ScoreFile(outcomes.with_name("scores.jsonl"))) as file:
        left = islice(_records(outcomes), file.lines, None)
        window = list(islice(left, WINDOW))
        if not window:
            return
        print(f"cll of the records under {model}, by transformers", flush=True)
        encoder, scorer = ConversationEncoder(tokenizer), HFScorer(model, vocab_size=true_vocab_size(tokenizer))
        while window:
            samples = [encoder.encode(parse_line(json.dumps({"messages": x["messages"]}), x["source"], train_on="last")) for x in window]
            scored = [sample_score(sample, *values) for sample, values in zip(samples, scorer(samples), strict=True)]
            file.append({"line": line, **score} for line, score in enumerate(scored, file.lines + 1))
            window = list(islice(left, WINDOW))


def scores_of_records(outcomes: Path) -> Iterator[dict[str, float]]:
    """Of each record that was scored, in order: mean log p, entropy and cll of its answer's tokens, nats, and the shares above 0 and below -1, -3, -5."""
    path = outcomes.with_name("scores.jsonl")
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in takewhile(lambda line: line.endswith("\n"), file):  # a kill may have cut off the last
            yield {name: value for name, value in json.loads(line).items() if name in FIELDS or name.startswith("cll_")}


def _records(outcomes: Path) -> Iterator[dict[str, Any]]:
    return (outcome["record"] for outcome in read_scores(outcomes) if "record" in outcome)
