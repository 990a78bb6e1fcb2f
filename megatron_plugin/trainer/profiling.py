"""torch's profiler over a few steps of a run: <run_dir>/profile/steps_N-M_rankR.json.gz, for chrome://tracing and ui.perfetto.dev.

A run that is not asked for it does not import the profiler.  A run that resumes inside the window profiles what is left of it, under a
name of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_plugin.config import Config

if TYPE_CHECKING:
    from torch.profiler import profile

__all__ = ["ProfileWindow"]

log = logging.getLogger("megatron_plugin")


class ProfileWindow:
    """Of one run on this rank.  `before` and `after` every step."""

    def __init__(self, config: Config):
        wanted = config.profile
        self._on = bool(wanted.first_step) and dist.get_rank() in wanted.ranks
        self._first, self._last = wanted.first_step, min(wanted.first_step + wanted.steps - 1, config.train.steps)
        self._folder = Path(config.run_dir) / "profile"
        self._profile: profile | None = None
        self._began = 0

    def before(self, step: int) -> None:
        """Step `step`, from 1, is about to begin."""
        if self._on and self._profile is None and self._first <= step <= self._last:
            from torch import profiler

            activities = [kind for kind in (profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA) if kind in profiler.supported_activities()]
            self._profile, self._began = profiler.profile(activities=activities, record_shapes=True), step
            self._profile.start()

    def after(self, step: int) -> None:
        """It is over."""
        if self._profile is not None and step >= self._last:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what there is up to `step`; nothing where nothing is under way.  A disk that refuses it is no reason to stop."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        step = max(step, self._began)  # the first one of them may have failed
        try:
            profile.stop()
            path = self._free(step)
            profile.export_chrome_trace(str(path))
            log.warning("profile of steps %d to %d: %s", self._began, step, path)
        except Exception as error:  # of a device that has failed, too: not what the run ends for
            log.warning("the profile of steps %d to %d cannot be written: %s", self._began, step, error)

    def _free(self, step: int) -> Path:
        """A name that no trace has, claimed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        stem, number = f"steps_{self._began}-{step}_rank{dist.get_rank()}", 1
        while True:
            path = self._folder / (f"{stem}.json.gz" if number == 1 else f"{stem}_{number}.json.gz")
            try:
                path.touch(exist_ok=False)
                return path
            except FileExistsError:
                number += 1
