"""Kills, full disks, locks and interruptions: nothing that was done is lost, and the next run says what to do."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("zarr")

from fastcam import jobs
from fastcam._testing.jobs import Numbered, tiny
from fastcam._testing.kills import COLUMNS, read, recorded_done, same_arrays
from fastcam.jobs import layout, writer
from fastcam.jobs.layout import DONE, PENDING


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def source():
    return Numbered(100, broken=(7, 90))


OPTIONS = {"shard_rows": 32, "batch_size": 16, "targets": "top2", "workers": 2}


@pytest.fixture(scope="module")
def whole(model, source, tmp_path_factory):
    """The store of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "whole.zarr"
    jobs.run(model, source, out, **OPTIONS)
    return out


def harness(kills, folder):
    command = [sys.executable, "-P", "-m", "fastcam._testing.kills", str(kills), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_random_moments(tmp_path):
    """The harness raises where anything done is lost, torn, or differs from the uninterrupted run by a bit."""
    found = harness(5, tmp_path)
    assert found["kills"] >= 5
    assert found["repeated"] <= found["allowed"]


@pytest.mark.slow
def test_killed_sixty_times(tmp_path):
    found = harness(60, tmp_path)
    assert found["kills"] >= 60
    assert found["checked"] > 1000


class Dies(BaseException):
    """Stands for the end of the process: no handler of the package's catches it on the way to the disk."""


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_at_every_write(model, source, whole, tmp_path, monkeypatch, stride):
    """The run is ended before or after the rename of its n-th file, for every n; resumed, it equals the whole run.

    Half-written files are left in place, as a killed process leaves them.
    """
    real, count = layout.write_durably, [0]

    def dying(path, data):
        count[0] += 1
        if count[0] == limit:
            if before:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(path.name + ".0.partial").write_bytes(data[: len(data) // 2])
            else:
                real(path, data)
            raise Dies
        if count[0] > limit:
            raise Dies  # a dead process writes no more
        real(path, data)

    monkeypatch.setattr(layout, "write_durably", dying)
    monkeypatch.setattr(writer, "write_durably", dying)
    expected = read(whole)
    limit, count[0], before = 10**9, 0, False
    jobs.run(model, source, tmp_path / "count.zarr", **OPTIONS)
    total = count[0]
    assert total > 40
    for step in range(1, total + 1, stride):
        out = tmp_path / f"{step}.zarr"
        limit, count[0], before = step, 0, step % 2 == 0
        with pytest.raises(Dies):
            jobs.run(model, source, out, **OPTIONS)
        limit = 10**9
        if (out / "zarr.json").exists() and (out / "maps").exists() and writer.facts_of(out):
            shown = read(out)
            done = shown["status"] == DONE
            for name in COLUMNS:
                assert np.array_equal(shown[name][done], expected[name][done]), (step, name)
        jobs.run(model, source, out, resume=True, **OPTIONS)
        same_arrays(whole, out)
        assert not list(out.rglob("*.partial"))


def fails_after(monkeypatch, writes, code):
    real, left = os.fsync, [writes]

    def fsync(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(layout.os, "fsync", fsync)


def test_every_write_of_a_store_is_durable(model, source, tmp_path, monkeypatch):
    # Zarr's own would still be under way in a thread when another write has failed and been told.
    def put(*args, **kwargs):
        raise AssertionError("written by zarr itself")

    monkeypatch.setattr("zarr.storage._local._put", put)
    jobs.run(model, source, tmp_path / "a.zarr", **OPTIONS)


@pytest.mark.parametrize("writes", [5, 45, 60, 75])
def test_a_full_disk_stops_the_job_and_loses_nothing(model, source, whole, tmp_path, monkeypatch, writes):
    out = tmp_path / "a.zarr"
    with monkeypatch.context() as patched:
        fails_after(patched, writes, errno.ENOSPC)
        with pytest.raises(jobs.JobError, match=r"No space left on device.*--resume") as error:
            jobs.run(model, source, out, **OPTIONS)
    assert not error.value.usage
    assert not list(out.rglob("*.partial"))
    before = recorded_done(out) if writes > 40 else None
    summary = jobs.run(model, source, out, resume=True, **OPTIONS)
    if before is not None:
        assert summary.processed == 100 - before.sum()
    same_arrays(whole, out)


def test_a_really_full_disk(model, source, whole, tmp_path):
    """The same on a file system of 80 kB, where this process may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes rights this process does not have")
    try:
        with pytest.raises(jobs.JobError, match="No space left"):
            jobs.run(model, source, small / "a.zarr", **OPTIONS)
        room = ["mount", "-o", "remount,size=8m", str(small)]
        subprocess.run(room, check=True)
        jobs.run(model, source, small / "a.zarr", resume=True, **OPTIONS)
        same_arrays(whole, small / "a.zarr")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("out", ["/proc/maps.zarr", "/dev/null/maps.zarr"])
def test_a_folder_that_cannot_be_written(model, source, out):
    with pytest.raises(jobs.JobError, match=f"cannot write to {out}: .*another --out"):
        jobs.run(model, source, out)


def test_a_store_that_has_become_read_only(model, source, tmp_path, monkeypatch):
    """A process of root's is not held back by permissions, so the refusal is made here."""
    out = tmp_path / "a.zarr"
    jobs.run(model, source, out, limit=20)
    real = os.open

    def refusing(path, *rest):
        if str(path).endswith(writer.LOCK):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest)

    monkeypatch.setattr(writer.os, "open", refusing)
    with pytest.raises(jobs.JobError, match=r"cannot write to .*Permission denied"):
        jobs.run(model, source, out, limit=20, resume=True)


def test_a_second_writer_is_refused_and_named(model, tmp_path):
    out = tmp_path / "a.zarr"
    slow = Numbered(60, delay=0.02)
    first = threading.Thread(target=jobs.run, args=(model, slow, out))
    first.start()
    while not (out / "status").exists():
        time.sleep(0.01)
    with pytest.raises(jobs.JobError, match=f"being written by process {os.getpid()} on "):
        jobs.run(model, slow, out, resume=True)
    first.join()
    assert jobs.run(model, slow, out, resume=True).processed == 0


def test_a_store_that_is_finished_while_it_is_looked_at_is_one(tmp_path, monkeypatch):
    shapes = layout.Layout(4, (3, 3), False, ())
    out = tmp_path / "a.zarr"
    out.mkdir()
    layout.create_arrays(out, shapes, list("abcd"))
    (out / writer.CREATING).touch()
    (out / f"{writer.CREATING}.0123.partial").touch()  # of a mark whose writing was cut short
    assert writer.facts_of(out) is None
    real = Path.exists

    def finished_first(path):
        if path.name == writer.CREATING:
            monkeypatch.undo()
            writer.create(out, shapes, list("abcd"), {"format": 1})
        return real(path)

    monkeypatch.setattr(Path, "exists", finished_first)
    assert writer.facts_of(out)["format"] == 1


def test_a_dead_writers_lock_holds_nobody_back(model, source, tmp_path):
    out = tmp_path / "a.zarr"
    out.mkdir()
    (out / writer.LOCK).write_text("process 1 on nowhere\n")
    assert jobs.run(model, source, out, resume=True).done == 98


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also in a process begun in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_store_to_go_on_with(tmp_path, model, interruptible):
    class Stops(Numbered):
        def load(self, index):
            if armed and index == 70:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGINT)
            return super().load(index)

    armed, out = True, tmp_path / "a.zarr"
    source = Stops(100)
    with pytest.raises(KeyboardInterrupt):
        jobs.run(model, source, out, **OPTIONS)
    status = jobs.Store(out).status
    assert 0 < (status == DONE).sum() < 100
    assert np.array_equal(recorded_done(out), status != PENDING)  # all of it stands in the arrays
    armed = False
    summary = jobs.run(model, source, out, resume=True, **OPTIONS)
    assert summary.processed == (status == PENDING).sum()
    jobs.run(model, source, tmp_path / "b.zarr", **OPTIONS)
    same_arrays(out, tmp_path / "b.zarr")


def test_a_running_job_shows_its_results_now_and_then(model, whole, tmp_path, monkeypatch):
    """With the pause between looks at zero, every batch is in the arrays at once."""
    monkeypatch.setattr(writer, "FLUSH", 0.0)
    seen = []

    class Looks(Numbered):
        def label(self, index):
            if (out / "status" / "c").exists():
                seen.append(int((read(out)["status"] != PENDING).sum()))
            return 0

    out = tmp_path / "a.zarr"
    jobs.run(model, Looks(200), out, **{**OPTIONS, "targets": "labels", "shard_rows": 208})
    assert any(0 < count < 200 for count in seen)


def test_an_existing_store_is_not_touched_unasked(model, source, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(jobs.JobError, match="exists; pass --resume") as error:
        jobs.run(model, source, whole, **OPTIONS)
    assert error.value.usage
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_another_folder_is_not_touched(model, source, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(jobs.JobError, match=r"holds 'holiday.jpg' and is no store"):
        jobs.run(model, source, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(jobs.JobError, match=r"holiday\.jpg is a file"):
        jobs.run(model, source, tmp_path / "holiday.jpg", resume=True)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["maps", "journal", "status"])
def test_a_folder_with_the_names_of_a_store_is_not_touched(model, source, tmp_path, name):
    """Only what a creation marked as its own may be deleted."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_bytes(b"precious")
    with pytest.raises(jobs.JobError, match=f"holds '{name}' and is no store"):
        jobs.run(model, source, tmp_path)
    assert (tmp_path / name / "mine.txt").read_bytes() == b"precious"


def test_owners_of_blocks_leave_the_journals_of_others(tmp_path):
    """Three writers, a block of four batches each, taking turns: each settles its own, and every row is there."""
    shape = layout.Layout(192, (2, 2), False, (3,), block=64)
    writer.create(tmp_path, shape, [str(row) for row in range(192)], {})
    writers = [writer.BlockWriter(tmp_path, shape) for _ in range(3)]
    for batch in range(4):
        for block, each in enumerate(writers):
            rows = np.arange(16) + 64 * block + 16 * batch
            results = shape.empty(16)
            results["scores"][:] = rows[:, None]
            results["status"][:] = DONE
            each.append(rows, results)
            if batch == 2:
                each.settle([block])
    for block, each in enumerate(writers):
        each.settle([block])
    last = writer.BlockWriter(tmp_path, shape)
    last.settle()
    group = layout.need_zarr().open_group(tmp_path, mode="r")
    assert (group["status"][:] == DONE).all()
    assert (group["scores"][:] == np.arange(192)[:, None]).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "grad_cam"}, "method: 'lift_cam' in the store, 'grad_cam' now"),
        ({"targets": "top3"}, "targets: 'top2' in the store, 'top3' now"),
        ({"dtype": "uint8"}, "dtype: 'float16' in the store, 'uint8' now"),
        ({"size": 9}, r"size: 'layer' in the store, \[9, 9\] now"),
        ({"options": {"relu": False}}, "options.relu: True in the store, False now"),
        ({"limit": 50}, "limit: None in the store, 50 now"),
        ({"precision": "bf16"}, "precision: None in the store, 'bf16' now"),
    ],
)
def test_another_job_is_refused_with_the_difference(model, source, whole, change, named):
    with pytest.raises(jobs.JobError, match=named) as error:
        jobs.run(model, source, whole, resume=True, **{**OPTIONS, **change})
    assert error.value.usage


def test_options_that_a_store_is_too_old_to_name_stand_at_their_defaults(model, tmp_path):
    out = tmp_path / "a.zarr"
    few = Numbered(4)
    jobs.run(model, few, out)
    facts = writer.facts_of(out)
    assert facts["options"].pop("rule") == "rescale"
    writer.write_facts(out, facts)
    assert jobs.run(model, few, out, resume=True).processed == 0
    with pytest.raises(jobs.JobError, match=r"options\.rule: 'rescale' in the store, 'reveal_cancel' now"):
        jobs.run(model, few, out, resume=True, options={"rule": "reveal_cancel"})


def test_other_weights_and_other_images_are_refused(source, whole):
    other = tiny()
    with torch.no_grad():
        next(other.parameters())[0] += 1e-3
    with pytest.raises(jobs.JobError, match="weights_hash"):
        jobs.run(other, source, whole, resume=True, **OPTIONS)
    with pytest.raises(jobs.JobError, match=r"source.items: 100 in the store, 99 now"):
        jobs.run(tiny(), Numbered(99), whole, resume=True, **OPTIONS)


def test_images_that_were_moved_are_gone_on_with(model, tmp_path, caplog):
    """The path is no part of a job; what lies there is, by names and by content."""
    Image = pytest.importorskip("PIL.Image")

    def pictures(name, grey):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (16, 16), (grey + number,) * 3).save(tmp_path / name / f"{number}.png")

    pictures("first", 10)
    seen = {"image_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    out = tmp_path / "a.zarr"
    jobs.run(model, tmp_path / "first", out, **seen)
    (tmp_path / "first").rename(tmp_path / "second")
    with caplog.at_level("WARNING"):
        summary = jobs.run(model, tmp_path / "second", out, resume=True, **seen)
    assert (summary.processed, summary.done) == (0, 3)
    assert f"found at {tmp_path}/first before, are taken from {tmp_path}/second" in caplog.text
    assert jobs.Store(out).provenance["source"]["where"] == str(tmp_path / "second")
    pictures("other", 90)
    with pytest.raises(jobs.JobError, match=r"at .*other 0\.png is not what was explained") as error:
        jobs.run(model, tmp_path / "other", out, resume=True, **seen)
    assert error.value.usage
    assert jobs.Store(out).provenance["source"]["where"] == str(tmp_path / "second")
    (tmp_path / "other/0.png").rename(tmp_path / "other/00.png")
    with pytest.raises(jobs.JobError, match=r"source\.ids_hash"):
        jobs.run(model, tmp_path / "other", out, resume=True, **seen)


def test_a_store_opens_with_plain_zarr(whole):
    """Array names, sizes and attributes are a contract with tools that know nothing of this package."""
    import zarr

    group = zarr.open_group(whole, mode="r")
    assert group.metadata.zarr_format == 3
    sizes = {name: array.shape for name, array in group.arrays()}
    assert sizes["maps"] == (100, 2, 8, 8)
    assert sizes["targets"] == (100, 2)
    assert sizes["scores"] == (100, 5)
    assert sizes["ids"] == sizes["status"] == sizes["error"] == sizes["digest"] == (100,)
    assert group["maps"].dtype == np.float16
    assert group["maps"].shards == (32, 2, 8, 8)
    assert group["maps"].chunks[0] <= 32
    assert group["ids"][8] == "image-8"
    names = {name: array.metadata.dimension_names for name, array in group.arrays()}  # xarray goes by these
    assert names["maps"] == ("item", "target", "y", "x")
    assert names["scores"] == ("item", "class")
    assert names["status"] == names["ids"] == ("item",)
    facts = dict(group.attrs)["fastcam"]
    for key in ("model", "weights_hash", "method", "options", "versions", "commit", "preprocessing", "source"):
        assert key in facts
    assert facts["options"]["relu"] is True


@pytest.mark.peers
def test_a_store_opens_with_xarray(whole):
    xarray = pytest.importorskip("xarray")
    data = xarray.open_zarr(whole, consolidated=False)
    assert dict(data.sizes) == {"item": 100, "target": 2, "y": 8, "x": 8, "class": 5}
    store = jobs.Store(whole)
    good = data.isel(item=np.flatnonzero(data.status == DONE))
    assert good.sizes["item"] == 98
    restored = (good.maps.astype("float32") * good.scale + good.offset).sel(item=3).values
    assert np.array_equal(restored, store.raw(3).numpy())
    assert [str(name) for name in data.ids[:2].values] == store.ids[:2]
    assert data.attrs["fastcam"]["method"] == "lift_cam"
