"""Plant one-line faults in a copy of the tree; the test named for each must fail.  A fault that survives is a hole in the suite.

    python -m tests.mutants [word ...]        only faults whose name holds a word; keeps the table tests/MUTANTS.md
"""

import sys

from tests.mutants import checkpoints, commands, core, ddt, dynamics, guard, inputs, observed, packaging, parity, rollout_faults
from tests.plant import main

MUTANTS = [mutant for module in (core, ddt, checkpoints, guard, rollout_faults, inputs, parity, dynamics, commands, observed, packaging) for mutant in module.MUTANTS]

if __name__ == "__main__":
    sys.exit(main(MUTANTS, sys.argv[1:]))
