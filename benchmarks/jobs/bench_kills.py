"""Jobs killed with SIGKILL at random moments and resumed until they are finished; see `fastcam._testing.kills`.

    python -P benchmarks/jobs/bench_kills.py [--kills 60] [--seed 0]

The harness raises, and nothing is written, unless after every kill all items shown as done equal the uninterrupted run
to the bit, none that was done is lost, and every finished store equals the uninterrupted one in all its arrays.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

KEYS = ("name", "kills", "stores", "at_creation", "journalled", "checked", "repeated", "allowed")


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="processes to kill (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "fastcam._testing.kills", options.kills, folder, options.seed]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = {"name": "random kills", "seed": options.seed, **json.loads(done.stdout)}
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    harness.write("jobs_kills", "cpu", [found], options.out, KEYS)


if __name__ == "__main__":
    main()
