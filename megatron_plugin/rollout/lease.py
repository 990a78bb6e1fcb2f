"""One trainer to a server: the newcomer is refused while the one before it was seen lately."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["LEASE_S", "Lease"]

LEASE_S = 600.0
"""Seconds that a trainer may be silent.  It is heard with every weight update, that is at every step with rollouts; a longer step costs it the lease,
and who then loses the server to a newcomer is told so by the weight versions, as ever."""


@dataclass
class Lease:
    """Kept by a server's worker."""

    owner: str = ""
    seen: float = -math.inf
    """time.monotonic()"""

    def claim(self, owner: str, now: float | None = None) -> dict[str, Any] | None:
        """None: granted, or renewed.  Else who has it: {"owner": ..., "seen_s": seconds since it was heard}."""
        now = time.monotonic() if now is None else now
        if self.owner not in ("", owner) and now - self.seen < LEASE_S:
            return {"owner": self.owner, "seen_s": now - self.seen}
        self.owner, self.seen = owner, now
        return None

    def release(self, owner: str) -> None:
        """At the end of a trainer, so that the next one need not wait."""
        if self.owner == owner:
            self.owner = ""
