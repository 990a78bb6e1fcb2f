"""Several `megatron-plugin train FILE --smoke` in one process, which imports torch and megatron-core once; what test_smoke_runs.py starts.

Prints "<file> <exit code> <seconds of CPU>" behind each."""

import sys
import time


def main() -> int:
    from megatron_plugin import cli

    codes = []
    for file in sys.argv[1:]:
        began = time.process_time()
        codes.append(cli.main(["train", file, "--smoke"]))
        print(f"{file} {codes[-1]} {time.process_time() - began:.1f}", flush=True)
    return max(codes)


if __name__ == "__main__":  # megatron-core's checkpoint writers are spawned, which imports this file
    sys.exit(main())
