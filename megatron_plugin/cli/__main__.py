"""python -m megatron_plugin.cli, which torchrun starts."""

import sys

from megatron_plugin.cli import main
from megatron_plugin.cli.spawned import end_with_parent

if __name__ == "__main__":
    sys.exit(main())
if __name__ == "__mp_main__":
    end_with_parent()
