"""python -m megatron_plugin.cli, which torchrun starts."""

import sys

from megatron_plugin.cli import main
from megatron_plugin.cli.spawned import end_with_parent

if __name__ == "__main__":
    __spec__ = None  # a process that is spawned imports a main module by its path then, and one called __main__ by its name never (3.11's multiprocessing/spawn.py)
    sys.exit(main())
if __name__ == "__mp_main__":
    end_with_parent()
