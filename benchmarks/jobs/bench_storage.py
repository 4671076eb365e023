"""Bytes an item of a job's store, by what is kept: one whole shard of random values, which compress worst.

    python -P benchmarks/jobs/bench_storage.py

Maps are uniform in [0, 1], scores and digests random, ids of the length of ImageNet's paths; all from one seed, so that
the sizes are those of the store's layout and the compressor's version, whatever machine runs it. Bytes are those of all
files of the store. Nothing is written unless the store reads back what was put into it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import jobs
from fastcam.jobs.layout import DONE, Layout
from fastcam.jobs.writer import BlockWriter, create

KEYS = ("name", "bytes_per_item", "rows", "shard_rows", "files", "match")
#: Row -> (shape of a map, of the scores).
KINDS = {
    "7 x 7, all 1000 scores": ((7, 7), (1000,)),
    "7 x 7": ((7, 7), ()),
    "14 x 14": ((14, 14), ()),
    "224 x 224": ((224, 224), ()),
}
#: Items of the job whose shards these are: so many that shards are as large as they become.
ITEMS = 1_280_000


def measure(name: str, folder: Path) -> dict[str, Any]:
    map_shape, score_shape = KINDS[name]
    rows = Layout(ITEMS, map_shape, False, score_shape).block
    layout = Layout(rows, map_shape, False, score_shape, block=rows)
    chance = np.random.default_rng(0)
    columns = layout.empty(rows)
    columns["maps"][:] = chance.random((rows, *map_shape), dtype=np.float32)
    columns["scores"][:] = chance.normal(size=(rows, *score_shape))
    columns["targets"][:] = chance.integers(0, 1000, rows)
    columns["digest"][:] = [chance.bytes(16).hex() for _ in range(rows)]
    columns["status"][:] = DONE
    ids = [f"n{chance.integers(10**8):08d}/ILSVRC2012_val_{row:08d}.JPEG" for row in range(rows)]
    create(folder, layout, ids, {"input_size": [224, 224]})
    BlockWriter(folder, layout).put(0, columns)
    store = jobs.Store(folder)
    names = ("maps", "scores", "targets", "digest")
    match = store.ids == ids and all(np.array_equal(store.column(n)[:], columns[n]) for n in names)
    if not match:
        raise SystemExit(f"{name}: the store holds something else than was put into it")
    files = [path for path in folder.rglob("*") if path.is_file()]
    each = sum(path.stat().st_size for path in files) / rows
    print(f"{name}: {each:.1f} bytes an item, {rows} rows a shard")
    shards = [path for path in files if path.name != "zarr.json"]
    return {
        "name": name,
        "bytes_per_item": each,
        "rows": rows,
        "shard_rows": layout.block,
        "files": len(shards),
        "match": match,
    }


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    rows = []
    for name in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder)))
    harness.write("jobs_storage", "cpu", rows, options.out, KEYS, command="python -P benchmarks/jobs/bench_storage.py")


if __name__ == "__main__":
    main()
