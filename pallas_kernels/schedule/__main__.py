"""`python -m pallas_kernels.schedule --op=megablox,splash --tpu=v5p [--json]`; see README.md."""

import argparse
import json
import sys
from pathlib import Path

from pallas_kernels import aot
from pallas_kernels.schedule.kernels import KERNELS
from pallas_kernels.schedule.report import measure


def main() -> int:
    parser = argparse.ArgumentParser(prog="pallas_kernels.schedule", description="What a tile of a TPU kernel costs.")
    parser.add_argument("--op", required=True, help=f"one or more of: {', '.join(KERNELS)}; separated by commas")
    parser.add_argument("--tpu", required=True, help=f"one or more of: {', '.join(aot.TOPOLOGIES)}; separated by commas")
    parser.add_argument("--json", action="store_true", help="a list of reports as JSON, instead of tables")
    parser.add_argument("--dump", type=Path, help="keep the compiler's listings in this folder")
    flags = parser.parse_args()
    if not aot.available():
        print("pallas_kernels.schedule needs libtpu: pip install 'jax[tpu]', or libtpu alone", file=sys.stderr)
        return 2
    reports = []
    for op in flags.op.split(","):
        for tpu in flags.tpu.split(","):
            try:
                report = measure(op, tpu, flags.dump / f"{op}-{tpu}" if flags.dump else None)
            except (ValueError, RuntimeError) as failure:
                print(f"pallas_kernels.schedule: {failure}", file=sys.stderr)
                return 2
            reports.append(report)
            if not flags.json:
                print(report.table() + "\n", flush=True)
    if flags.json:
        print(json.dumps([report.json() for report in reports], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
