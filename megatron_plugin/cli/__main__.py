"""python -m megatron_plugin.cli, which torchrun starts."""

import sys

from megatron_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
