"""What a fleet is asked, and what becomes of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from megatron_plugin.rollout.engine import Completion, SamplingParams

__all__ = ["Generated", "Request"]


@dataclass(frozen=True)
class Request:
    """One prompt, of which params.n completions are wanted.  `key` names it in the results."""

    key: Hashable
    prompt_ids: Sequence[int]
    params: SamplingParams


@dataclass
class Generated:
    """What became of the requests of one `generate`, each key in exactly one of the first three, and its counters."""

    completions: dict[Hashable, list[Completion]] = field(default_factory=dict)
    refused: dict[Hashable, str] = field(default_factory=dict)
    """Causes.  A healthy engine said no to this prompt, as to one that leaves no room, or failed at it six times: asking again would not help."""
    missing: dict[Hashable, str] = field(default_factory=dict)
    """Causes.  No engine was left to ask: ask again after `restart_dead` and an update."""
    lost: dict[str, str] = field(default_factory=dict)
    """Engines that were found DEAD by this call, with causes."""
    suspected: int = 0
    """Times an engine became SUSPECT."""
    retried: int = 0
    """Times a request was taken from a lost engine, to be asked elsewhere, or is asked again after it failed."""
    late: int = 0
    """Answers thrown away because their engine had been given up, since the last call's result."""
    tokens: int = 0
