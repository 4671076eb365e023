"""Reading, exporting and merging stores."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("zarr")

from fastcam import jobs
from fastcam._testing.jobs import Numbered, tiny
from fastcam._testing.kills import same_arrays
from fastcam.jobs.layout import DONE, Layout
from fastcam.jobs.writer import Lock


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "a.zarr"
    jobs.run(model, Numbered(40, broken=(7,)), out, targets="top2", shard_rows=16)
    return jobs.Store(out)


def test_iteration_and_lookup(store):
    items = list(store)
    assert [item.index for item in items] == list(range(40))
    assert torch.equal(items[11].raw, store.raw("image-11"))
    assert items[7].raw is None
    assert items[7].error == "broken on purpose"
    assert torch.equal(store.raw(-1), store.raw(39))
    with pytest.raises(KeyError, match="no item 'image-40'"):
        store.map("image-40")
    with pytest.raises(IndexError, match="items 0 to 39, not 40"):
        store.map(40)


def test_what_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no store"):
        jobs.Store(tmp_path / "none.zarr")
    (tmp_path / "letter.txt").touch()
    with pytest.raises(jobs.JobError, match=r"letter\.txt"):
        jobs.Store(tmp_path)


def test_exports_hold_the_maps(store, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    array = np.load(store.export(tmp_path / "a.npy", "npy", size="input"))
    assert array.shape == (40, 2, 16, 16)
    assert np.isnan(array[7]).all()
    assert np.array_equal(array[3], store.map(3, "input").numpy())
    with np.load(store.export(tmp_path / "a.npz", "npz", normalize=False)) as found:
        assert np.array_equal(found["maps"][12], store.raw(12).numpy())
        assert found["ids"].tolist() == store.ids
        assert np.array_equal(found["targets"], store.targets)
        assert found["error"][7] == "broken on purpose"
    folder = store.export(tmp_path / "png", "png", size=(6, 7))
    with Image.open(folder / "12-1.png") as picture:
        expected = (store.map(12, (6, 7))[1] * 255).round().numpy()
        assert np.array_equal(np.asarray(picture), expected)
    assert not (folder / "7-0.png").exists()
    assert json.loads((folder / "index.json").read_text())["12"] == "image-12"
    with tarfile.open(store.export(tmp_path / "a.tar", "webdataset")) as tar:
        names = tar.getnames()
        assert len(names) == 79  # a map and facts an item, facts alone for the one that failed
        held = np.load(io.BytesIO(tar.extractfile("000000012.map.npy").read()))
        assert np.array_equal(held, store.map(12).numpy())
        assert json.loads(tar.extractfile("000000007.json").read())["error"] == "broken on purpose"
    with pytest.raises(FileExistsError, match=r"a\.npy exists"):
        store.export(tmp_path / "a.npy", "npy")
    with pytest.raises(ValueError, match="npy, npz, png, webdataset; got 'gif'"):
        store.export(tmp_path / "a.gif", "gif")


def test_a_job_in_shards_merges_into_the_whole_job(model, tmp_path):
    """Three shards of 70 items, one of them the store of another: equal to the bit to the job without shards."""
    source = Numbered(70, broken=(2, 50))
    jobs.run(model, source, tmp_path / "whole.zarr")
    for i in range(3):
        jobs.run(model, source, tmp_path / "part-{i}-of-{n}.zarr", shard=f"{i}/3")
    parts = [tmp_path / f"part-{i}-of-3.zarr" for i in range(3)]
    summary = jobs.merge(tmp_path / "merged.zarr", parts[::-1])
    assert (summary.items, summary.done, summary.failed) == (70, 68, 2)
    same_arrays(tmp_path / "whole.zarr", tmp_path / "merged.zarr")
    # The merged store is the whole job's: it can be resumed as such.
    assert jobs.run(model, source, tmp_path / "merged.zarr", resume=True).processed == 0
    with pytest.raises(jobs.JobError, match="items 16 to 47 are missing"):
        jobs.merge(tmp_path / "b.zarr", [parts[0], parts[2]])
    with pytest.raises(jobs.JobError, match="items 48 to 69 are missing"):
        jobs.merge(tmp_path / "b.zarr", parts[:2])
    with pytest.raises(jobs.JobError, match="items from 16 are there twice"):
        jobs.merge(tmp_path / "b.zarr", [parts[0], parts[1], parts[1], parts[2]])
    with pytest.raises(jobs.JobError, match="exists"):
        jobs.merge(tmp_path / "merged.zarr", parts)
    jobs.run(model, source, tmp_path / "other.zarr", shard="1/3", targets=0)
    with pytest.raises(jobs.JobError, match="not of one job; targets: 'predicted' in the store, 0 now"):
        jobs.merge(tmp_path / "b.zarr", [parts[0], tmp_path / "other.zarr", parts[2]])
    assert not (tmp_path / "b.zarr").exists()


def test_merging_only_reads_the_shards(model, tmp_path):
    """Not even a lock is written; a shard that is being written is refused all the same."""
    parts = [jobs.run(model, Numbered(40), tmp_path / f"{i}.zarr", shard=f"{i}/2").store for i in range(2)]
    times = lambda: {p: p.stat().st_mtime_ns for part in parts for p in (part, *part.rglob("*"))}  # noqa: E731
    before = times()
    jobs.merge(tmp_path / "m.zarr", parts)
    assert times() == before
    with Lock(parts[1]), pytest.raises(jobs.JobError, match=rf"1\.zarr is being written by process {os.getpid()}"):
        jobs.merge(tmp_path / "n.zarr", parts)
    (parts[0] / "writer.lock").write_text("process 1 on nowhere\n")  # of a writer that was killed
    assert jobs.merge(tmp_path / "n.zarr", parts).done == 40


def test_shards_by_torchrun_and_slurm(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs RANK and WORLD_SIZE"):
        jobs.run(model, Numbered(40), tmp_path / "{i}.zarr", shard="auto")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert jobs.run(model, Numbered(40), tmp_path / "{i}.zarr", shard="auto").store == tmp_path / "2.zarr"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    jobs.run(model, Numbered(40), tmp_path / "{i}.zarr", shard="auto")
    assert jobs.Store(tmp_path / "1.zarr").ids == [f"image-{row}" for row in range(16, 32)]


def test_more_shards_than_tiles(model, tmp_path):
    source = Numbered(20)
    jobs.run(model, source, tmp_path / "whole.zarr")
    parts = [jobs.run(model, source, tmp_path / f"{i}.zarr", shard=f"{i}/5").store for i in range(5)]
    assert jobs.merge(tmp_path / "merged.zarr", parts).done == 20
    same_arrays(tmp_path / "whole.zarr", tmp_path / "merged.zarr")


def test_an_unfinished_shard_is_not_merged(model, tmp_path):
    class Stops(Numbered):
        def label(self, index):
            if index >= 32:
                raise KeyboardInterrupt
            return 0

    with pytest.raises(KeyboardInterrupt):
        jobs.run(model, Stops(64), tmp_path / "a.zarr", shard="0/1", targets="labels", batch_size=16)
    pending = int((jobs.Store(tmp_path / "a.zarr").status != DONE).sum())
    assert pending >= 32
    with pytest.raises(jobs.JobError, match=rf"not finished \({pending} items pending\)"):
        jobs.merge(tmp_path / "b.zarr", [tmp_path / "a.zarr"])


@pytest.mark.parametrize(
    ("shape", "scores", "block"),
    [
        ((7, 7), (1000,), 4096),  # 4098 bytes a row: 32 MiB
        ((14, 14), (10,), 8192),  # small rows: the most that is rewritten at a time
        ((224, 224), (1000,), 256),  # 104 kB a row
        ((5, 512, 512), (1000,), 16),  # never below a tile
    ],
)
def test_shards_are_of_a_size_that_fits_memory(shape, scores, block):
    layout = Layout(10**6, shape, len(shape) == 3, scores)
    assert layout.block == block
    assert layout.span(layout.blocks - 1)[1] == 10**6


def test_shard_rows_are_checked(model, tmp_path):
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        jobs.run(model, Numbered(4), tmp_path / "a.zarr", shard_rows=24)
    assert not (tmp_path / "a.zarr").exists()
