"""Which rows a step trains on.  One global stream of rows; the parallel layout only cuts each step's share out of it.

The stream is epoch after epoch, each a permutation that depends on (seed, epoch) alone; a step takes the next `global_batch` rows, also
across the end of an epoch, so no row is left out and none comes twice in an epoch.  The position is the number of rows consumed: it stays
valid when the number of data-parallel ranks, the micro-batch or the global batch changes between runs.
"""

from __future__ import annotations

import random

from megatron_plugin.data.errors import DataError

__all__ = ["BLANK_ROW", "RowOrder", "eval_steps", "shard"]

BLANK_ROW = -1  # stands for a row without any loss token (PackedRows.batch makes it)


class RowOrder:
    """The rows of each step, in an order given by the seed; `state_dict` holds plain ints."""

    def __init__(self, num_rows: int, global_batch: int, seed: int, *, shuffle: bool = True, fingerprint: int = 0):
        if num_rows < 1 or global_batch < 1:
            raise ValueError(f"RowOrder: got num_rows={num_rows}, global_batch={global_batch}, expected both >= 1")
        self.num_rows, self.global_batch, self.seed, self.shuffle = num_rows, global_batch, seed, shuffle
        self.fingerprint = fingerprint
        self.consumed = 0
        self._cached: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> float:
        """Epochs consumed so far, with the fraction of the current one."""
        return self.consumed / self.num_rows

    def next_step(self) -> list[int]:
        """Row indices of the next step, `global_batch` of them; moves the position."""
        rows = [self._row(i) for i in range(self.consumed, self.consumed + self.global_batch)]
        self.consumed += self.global_batch
        return rows

    def state_dict(self) -> dict[str, int]:
        return {
            "consumed": self.consumed,
            "seed": self.seed,
            "num_rows": self.num_rows,
            "fingerprint": self.fingerprint,
            "shuffle": int(self.shuffle),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position; DataError when it was saved for other rows, where it would point at something else."""
        own = self.state_dict()
        if set(state) != set(own):
            raise DataError(f"position of the data: got keys {sorted(state)}, expected {sorted(own)}")
        for key in ("num_rows", "fingerprint", "seed", "shuffle"):
            if state[key] != own[key]:
                remedy = "restore the data, tokenizer, data settings and seed of that run, or start a new run directory"
                raise DataError(
                    f"the checkpoint's data position does not fit this data: {key} got {own[key]}, expected {state[key]}; {remedy}"
                )
        if state["consumed"] < 0:
            raise DataError(f"position of the data: got consumed={state['consumed']}, expected >= 0")
        self.consumed = state["consumed"]

    def _row(self, index: int) -> int:
        epoch, offset = divmod(index, self.num_rows)
        if not self.shuffle:
            return offset
        if self._cached[0] != epoch:
            order = list(range(self.num_rows))
            # Python's generator, not torch.randperm: seeded by a string it gives the same order under each torch version.
            random.Random(f"megatron-plugin rows {self.seed} {epoch}").shuffle(order)
            self._cached = (epoch, order)
        return self._cached[1][offset]


def shard(rows: list[int], *, dp_rank: int, dp_size: int, micro_batch: int) -> list[list[int]]:
    """The micro-batches of one data-parallel rank: consecutive rows, so the union over ranks is `rows` in order whatever the layout."""
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"shard: got dp_rank={dp_rank}, expected 0 <= dp_rank < dp_size={dp_size}")
    if micro_batch < 1 or len(rows) % (dp_size * micro_batch):
        raise ValueError(
            f"shard: got a global batch of {len(rows)} rows, expected a multiple of {dp_size * micro_batch} "
            f"(data-parallel ranks {dp_size} x micro-batch {micro_batch}): change train.global_batch or train.micro_batch"
        )
    per_rank = len(rows) // dp_size
    own = rows[dp_rank * per_rank : (dp_rank + 1) * per_rank]
    return [own[i : i + micro_batch] for i in range(0, per_rank, micro_batch)]


def eval_steps(num_rows: int, global_batch: int) -> list[list[int]]:
    """Each row once, in order; the last step is filled with BLANK_ROW so that every rank runs the same number of micro-batches."""
    padded = [*range(num_rows), *[BLANK_ROW] * (-num_rows % global_batch)]
    return [padded[i : i + global_batch] for i in range(0, len(padded), global_batch)]
