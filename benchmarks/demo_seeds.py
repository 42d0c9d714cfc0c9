"""`engram demo` with several seeds of the random reader: the figures that the README quotes."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, provenance, write

KEPT = ("seed", "seconds", "facts", "steps", "rows_written", "categories", "capitals", "bits_per_byte", "drift")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default=RESULTS / "demo.json")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "engram.cli.main", "demo", "--seed", str(seed), "--out", folder]
            subprocess.run(command, check=False)
            result = json.loads((Path(folder) / "result.json").read_text())
        runs.append({key: result[key] for key in KEPT})
    write(args.out, {**provenance(args.seeds), "runs": runs})


if __name__ == "__main__":
    main()
