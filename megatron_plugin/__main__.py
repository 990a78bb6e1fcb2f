"""python -m megatron_plugin: the command `megatron-plugin`, as python -m megatron_plugin.cli is."""

import sys

from megatron_plugin.cli import main
from megatron_plugin.cli.spawned import end_with_parent

if __name__ == "__main__":
    __spec__ = None  # as in cli/__main__.py: what is spawned imports this file by its path, and ends with us
    sys.exit(main())
if __name__ == "__mp_main__":
    end_with_parent()
