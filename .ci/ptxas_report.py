"""Table of registers per kernel from `nvcc -Xptxas -v` logs; exit status 1 if any kernel spills.

python .ci/ptxas_report.py LOG...
"""

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def plain(names):
    """Demangled names without arguments, as far as c++filt is there: of kernels, or of what a kernel is made for."""
    try:
        text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return names
    return [re.split("[<,]", line.removeprefix("void ").split("(")[0].split("::")[-1])[0] for line in text.splitlines()]


def main():
    found = [match.groupdict() for log in sys.argv[1:] for match in ENTRY.finditer(Path(log).read_text())]
    if not found:
        sys.exit("no kernels in the logs: is -Xptxas -v set?")
    table = {}
    for entry, name in zip(found, plain([entry["name"] for entry in found]), strict=True):
        low, high, variants, spilled = table.get((name, entry["arch"]), (10**6, 0, 0, 0))
        registers, spill = int(entry["registers"]), max(int(entry["stores"]), int(entry["loads"]))
        table[name, entry["arch"]] = min(low, registers), max(high, registers), variants + 1, max(spilled, spill)
    print(f"{'kernel':32}{'arch':8}{'variants':>9}{'registers':>12}{'spilled bytes':>15}")
    for (name, arch), (low, high, variants, spilled) in sorted(table.items()):
        print(f"{name:32}{arch:8}{variants:9}{f'{low}-{high}':>12}{spilled:15}")
    if any(row[3] for row in table.values()):
        sys.exit("kernels spill registers")


if __name__ == "__main__":
    main()
