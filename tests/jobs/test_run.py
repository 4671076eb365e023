"""A job's results against `attribute`'s, and what a job does about items that go wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("zarr")

import fastcam
from fastcam import jobs
from fastcam._testing import models
from fastcam._testing.jobs import Numbered, tiny
from fastcam._testing.kills import same_arrays
from fastcam.jobs.compute import Attributor
from fastcam.jobs.layout import DONE, FAILED, PENDING


@pytest.fixture(scope="module")
def model():
    """One network for all tests: it is traced once."""
    return tiny()


def images(source, rows):
    return torch.stack([source.image(row) for row in rows])


@pytest.mark.parametrize("targets", ["predicted", "top3", 2])
def test_a_store_holds_what_attribute_gives(model, tmp_path, targets):
    """The oracle is `attribute` on tiles of 16 images, as a job runs them: equal to the bit in float32."""
    source = Numbered(40)
    summary = jobs.run(model, source, tmp_path / "a.zarr", targets=targets, dtype="float32")
    assert (summary.items, summary.done, summary.failed, summary.exit_code) == (40, 40, 0, 0)
    store = jobs.Store(tmp_path / "a.zarr")
    spec = None if targets == "predicted" else targets
    result = fastcam.attribute(model, images(source, range(16)), targets=spec)
    for row in (0, 7, 15):
        assert torch.equal(store.raw(row), result.raw[row])
        assert torch.equal(store.map(row, "input"), result.maps[row])
        assert np.array_equal(store.scores[row], result.scores[row].numpy())
        assert np.array_equal(store.targets[row], result.targets[row].numpy())
    assert store.ids == [f"image-{row}" for row in range(40)]
    assert store.digests[3] == source.load(3).digest
    assert (store.status == DONE).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
@pytest.mark.parametrize("size", [None, "input", (5, 9)])
def test_maps_read_back_as_attribute_scales_them(model, tmp_path, dtype, size):
    """What is read equals `attribute`'s own scaling of the same stored values; what is stored is near its raw maps."""
    source = Numbered(20)
    jobs.run(model, source, tmp_path / "a.zarr", dtype=dtype, targets="top2")
    store = jobs.Store(tmp_path / "a.zarr")
    batch = images(source, range(16))
    whole = fastcam.attribute(model, batch, targets="top2", size="layer" if size is None else size)
    unit = {"float16": 2.0**-11, "float32": 0.0, "uint8": 0.5 / 255}[dtype]
    for row in (1, 15):
        raw = store.raw(row)
        span = (whole.raw[row].amax((1, 2)) - whole.raw[row].amin((1, 2))).max()
        largest = whole.raw[row].abs().max() if dtype == "float16" else span
        assert (raw - whole.raw[row]).abs().max() <= unit * largest * 1.001
        # Resized and scaled by an independent implementation, in float64.
        wide = whole.maps.shape[2:]
        resized = raw.double()
        if size is not None:
            resized = torch.nn.functional.interpolate(raw.double()[None], wide, mode="bilinear")[0]
        low, high = resized.amin((1, 2), keepdim=True), resized.amax((1, 2), keepdim=True)
        expected = torch.where(high > low, (resized - low) / (high - low), 0.0)
        torch.testing.assert_close(store.map(row, size).double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(store.map(row, size, normalize=False).double(), resized, rtol=1e-5, atol=1e-6)
        if dtype == "float32":
            assert torch.equal(store.map(row, size), whole.maps[row])


@pytest.mark.parametrize("size", ["input", 12])
def test_maps_stored_at_other_sizes(model, tmp_path, size):
    source = Numbered(17)
    jobs.run(model, source, tmp_path / "a.zarr", size=size, dtype="float32")
    wanted = "input" if size == "input" else (12, 12)
    result = fastcam.attribute(model, images(source, range(16)), size=wanted, normalize=False)
    store = jobs.Store(tmp_path / "a.zarr")
    assert torch.equal(store.raw(4), result.maps[4])
    scaled = fastcam.attribute(model, images(source, range(16)), size=wanted)
    torch.testing.assert_close(store.map(4), scaled.maps[4], rtol=1e-6, atol=1e-6)


def test_tiny_and_huge_maps_keep_their_digits_in_float16(tmp_path):
    """A map of 1e-9 or 1e7 is stored times a power of two: exact but for float16's own rounding."""
    for factor in (1e-9, 1e7):
        net = models.by_hand([[1.0, 0.5], [0.0, 1.0]])
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(factor)
        shape = (2, 4, 4)
        data = torch.rand((3, *shape), generator=torch.Generator().manual_seed(0)).numpy()
        jobs.run(net, data, tmp_path / f"{factor}.zarr", image_size=None)
        raw = fastcam.attribute(net, torch.from_numpy(data)).raw
        store = jobs.Store(tmp_path / f"{factor}.zarr")
        for row in range(3):
            assert (store.raw(row) - raw[row]).abs().max() <= 2.0**-11 * raw[row].abs().max() * 1.01


def test_results_do_not_depend_on_batch_size_workers_or_interruption(model, tmp_path):
    """To the bit: the network always sees tiles of 16 in the same places."""
    source = Numbered(70, broken=(20,))
    jobs.run(model, source, tmp_path / "whole.zarr", shard_rows=32)
    for name, options in {
        "small": {"batch_size": 1, "workers": 1},
        "odd": {"batch_size": 50, "workers": 3},
        "large": {"batch_size": 256},
    }.items():
        jobs.run(model, source, tmp_path / f"{name}.zarr", shard_rows=32, **options)
        same_arrays(tmp_path / "whole.zarr", tmp_path / f"{name}.zarr")


def test_every_item_that_fails_says_why(model, tmp_path):
    source = Numbered(40, broken=(0, 9), odd={4: (8, 8)}, nan=(33,))
    summary = jobs.run(model, source, tmp_path / "a.zarr")
    assert (summary.done, summary.failed, summary.exit_code) == (36, 4, 3)
    store = jobs.Store(tmp_path / "a.zarr")
    errors = {row: store.errors[row] for row in np.flatnonzero(store.status == FAILED)}
    assert errors.pop(0) == errors.pop(9) == "broken on purpose"
    assert "(3, 8, 8), this job's are (3, 16, 16)" in errors.pop(4)
    assert "not finite" in errors.pop(33)
    assert store.targets[[0, 4, 9, 33]].tolist() == [-1] * 4
    assert np.isnan(store.scores[[0, 4, 9, 33]]).all()
    assert not errors
    with pytest.raises(ValueError, match=r"image-9\) failed: broken on purpose"):
        store.map(9)
    # Neighbours in the tile are as without them.
    clean = Numbered(40)
    jobs.run(model, clean, tmp_path / "b.zarr")
    other = jobs.Store(tmp_path / "b.zarr")
    for row in (1, 5, 32):
        assert torch.equal(store.raw(row), other.raw(row))


def test_failed_items_are_kept_or_tried_again(model, tmp_path):
    source, out = Numbered(40, broken=(3, 21)), tmp_path / "a.zarr"
    assert jobs.run(model, source, out).failed == 2
    healed = Numbered(40)
    kept = jobs.run(model, healed, out, resume=True)
    assert (kept.failed, kept.processed) == (2, 0)
    again = jobs.run(model, healed, out, resume=True, retry_failed=True)
    assert (again.failed, again.done, again.processed) == (0, 40, 2)
    jobs.run(model, healed, tmp_path / "b.zarr")
    same_arrays(out, tmp_path / "b.zarr")


def test_labels_are_targets_and_bad_ones_are_recorded(model, tmp_path):
    labels = [row % 5 for row in range(20)]
    labels[2], labels[3] = None, 5
    summary = jobs.run(model, Numbered(20, labels=labels), tmp_path / "a.zarr", targets="labels", dtype="float32")
    assert summary.failed == 2
    store = jobs.Store(tmp_path / "a.zarr")
    assert store.errors[2] == "there is no label for this item"
    assert store.errors[3] == "label 5 is out of range: the model's classes are 0 to 4"
    assert store.targets.tolist() == [-1 if row in (2, 3) else row % 5 for row in range(20)]
    source = Numbered(20)
    result = fastcam.attribute(model, images(source, range(16)), targets=[row % 5 for row in range(16)])
    assert torch.equal(store.raw(7), result.raw[7])


def test_several_labels_an_item(model, tmp_path):
    labels = [(row % 5, (row + 2) % 5) for row in range(20)]
    labels[4], labels[5] = (1, 9), (3,)
    jobs.run(model, Numbered(20, labels=labels), tmp_path / "a.zarr", targets="labels", dtype="float32")
    store = jobs.Store(tmp_path / "a.zarr")
    assert store.errors[4] == "label [1 9] is out of range: the model's classes are 0 to 4"
    assert store.errors[5] == "this item has another number of labels than the first"
    labels[4] = labels[5] = (0, 0)
    result = fastcam.attribute(model, images(Numbered(20), range(16)), targets=labels[:16])
    for row in (0, 3, 6, 15):
        assert torch.equal(store.raw(row), result.raw[row])
        assert store.targets[row].tolist() == list(labels[row])


def test_any_name_and_any_reason_can_be_stored(model, tmp_path):
    """Bytes of a file name that are no UTF-8, NUL, an emoji, 3000 letters; a reason of 100 kB with NUL in it."""
    names = ["\udcff.jpg", "a\0b", "\N{BACTRIAN CAMEL}.png", "x" * 3000]

    class Talks(Numbered):
        def load(self, index):
            if index == 1:
                raise ValueError("no\0\udce4 " + "y" * 100_000)
            return super().load(index)

    jobs.run(model, Talks(4, names=names), tmp_path / "a.zarr")
    store = jobs.Store(tmp_path / "a.zarr")
    assert store.ids == ["\\udcff.jpg", "a\\0b", "\N{BACTRIAN CAMEL}.png", "x" * 3000]
    assert store.errors[1].startswith("no\\0\\udce4 yyy")
    assert len(store.errors[1]) < 1020
    assert (store.status == [DONE, FAILED, DONE, DONE]).all()


def test_only_the_scores_explained(model, tmp_path):
    source = Numbered(18)
    jobs.run(model, source, tmp_path / "a.zarr", targets="top2", scores="targets")
    expected = fastcam.attribute(model, images(source, range(16)), targets="top2").scores.topk(2).values
    assert np.array_equal(jobs.Store(tmp_path / "a.zarr").scores[:16], expected.numpy())


@pytest.mark.parametrize("unreadable", [(), range(5)])
def test_nothing_to_explain(model, tmp_path, unreadable):
    source = Numbered(len(unreadable), broken=tuple(unreadable))
    summary = jobs.run(model, source, tmp_path / "a.zarr")
    assert (summary.items, summary.done, summary.failed) == (len(unreadable), 0, len(unreadable))
    store = jobs.Store(tmp_path / "a.zarr")
    assert store.errors == ["broken on purpose"] * len(unreadable)
    again = jobs.run(model, Numbered(len(unreadable)), tmp_path / "a.zarr", resume=True, retry_failed=True)
    assert again.done == len(unreadable)


def test_limit(model, tmp_path):
    assert jobs.run(model, Numbered(50), tmp_path / "a.zarr", limit=18).items == 18


def test_the_model_is_left_as_it_was(model, tmp_path):
    net = tiny().train()
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="train mode"):
        jobs.run(net, Numbered(20), tmp_path / "a.zarr")
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_threads_of_the_process_are_left_alone(model, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        jobs.run(model, Numbered(20), tmp_path / "a.zarr", workers=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_of_the_network(tmp_path):
    class Watches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = tiny(), set()
            self.eval()

        def forward(self, x):
            self.seen.add(torch.get_num_threads())
            return self.inner(x)

    net, before = Watches(), torch.get_num_threads()
    jobs.run(net, Numbered(20), tmp_path / "a.zarr", threads=before + 1, method="grad_cam", layer="inner.features")
    assert net.seen == {before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be an integer from 1 up, got 0"):
        jobs.run(net, Numbered(20), tmp_path / "b.zarr", threads=0)


def folders(root, names):
    """An image in each folder."""
    Image = pytest.importorskip("PIL.Image")
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (40 * place, 0, 0)).save(root / name / "x.png")
    return root


SEEN = {"image_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def test_class_folders_are_labels_if_they_fit_the_model(model, tmp_path):
    """As many folders as classes: in order. Fewer: no labels, which is said where they are asked for."""
    jobs.run(model, folders(tmp_path / "five", "edcba"), tmp_path / "a.zarr", targets="labels", **SEEN)
    store = jobs.Store(tmp_path / "a.zarr")
    assert store.ids == [f"{name}/x.png" for name in "abcde"]
    assert store.targets.tolist() == [0, 1, 2, 3, 4]
    three = folders(tmp_path / "three", "abc")
    with pytest.raises(jobs.JobError, match="there are 3 class folders and the model has 5 classes") as error:
        jobs.run(model, three, tmp_path / "b.zarr", targets="labels", **SEEN)
    assert error.value.usage
    assert not (tmp_path / "b.zarr").exists()
    jobs.run(model, three, tmp_path / "b.zarr", **SEEN)
    np.save(tmp_path / "labels.npy", np.array([4, 0, 2]))
    jobs.run(model, three, tmp_path / "c.zarr", targets=tmp_path / "labels.npy", **SEEN)
    assert jobs.Store(tmp_path / "c.zarr").targets.tolist() == [4, 0, 2]


def test_class_folders_that_bear_the_models_names(tmp_path):
    pytest.importorskip("safetensors")
    where = folders(tmp_path / "digits", ["7", "2", "5"])
    jobs.run("testbed:tiny_resnet", where, tmp_path / "a.zarr", targets="labels", image_size=32)
    assert jobs.Store(tmp_path / "a.zarr").targets.tolist() == [2, 5, 7]


class Fussy(torch.nn.Module):
    """A network that does not take an image with a pixel above a limit, nor more than `most` images at a time."""

    def __init__(self, most: int = 1000):
        super().__init__()
        self.inner, self.most = tiny(), most
        self.eval()

    def forward(self, x):
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes")
        if bool((x.detach() > 100).any()):
            raise RuntimeError("too bright")
        return self.inner(x)


@pytest.fixture
def fussy_source():
    class Bright(Numbered):
        def image(self, index):
            return super().image(index) + (1000 if index in (5, 18) else 0)

    return Bright(40)


def test_images_a_model_chokes_on_are_found(tmp_path, fussy_source):
    """Two of 40 make the network raise: they fail, and all others have their maps to the bit."""
    net = Fussy()
    summary = jobs.run(net, fussy_source, tmp_path / "a.zarr", method="grad_cam", layer="inner.features")
    assert (summary.done, summary.failed) == (38, 2)
    store = jobs.Store(tmp_path / "a.zarr")
    assert {row for row in range(40) if store.errors[row]} == {5, 18}
    assert store.errors[5] == "RuntimeError: too bright"
    jobs.run(net, Numbered(40), tmp_path / "b.zarr", method="grad_cam", layer="inner.features")
    other = jobs.Store(tmp_path / "b.zarr")
    for row in (4, 6, 17, 19, 39):
        assert torch.equal(store.raw(row), other.raw(row))


@pytest.mark.parametrize("most", [5, 1])
def test_out_of_memory_halves_the_batch_and_loses_nothing(tmp_path, caplog, most):
    net = Fussy(most)
    options = {"method": "grad_cam", "layer": "inner.features", "dtype": "float32"}
    with pytest.raises(jobs.JobError, match="can't allocate") if most == 1 else caplog.at_level("WARNING"):
        summary = jobs.run(net, Numbered(40), tmp_path / "a.zarr", **options)
    if most == 1:
        return  # not even the two images it is tried with
    assert summary.done == 40
    assert "going on with 4" in caplog.text
    jobs.run(Fussy(), Numbered(40), tmp_path / "b.zarr", **options)
    one, other = jobs.Store(tmp_path / "a.zarr"), jobs.Store(tmp_path / "b.zarr")
    for row in range(40):
        torch.testing.assert_close(one.raw(row), other.raw(row), rtol=1e-5, atol=1e-6)


def test_batch_size_is_probed_where_it_matters(model, monkeypatch):
    """On an accelerator, doubling goes on until memory is out; here the CPU plays one that fits 40 images."""
    from fastcam.jobs.options import Options
    from fastcam.models import load_model

    attributor = Attributor(load_model(model), Options(model, Numbered(1), "x"), torch.device("cpu"))
    attributor.device = torch.device("meta")  # anything but "cpu"

    def explain(batch, labels):
        if len(batch) > 40:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(attributor, "_explain", explain)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert attributor.choose_batch("auto", (3, 16, 16)) == 32
    assert attributor.choose_batch(24, (3, 16, 16)) == 24
    assert attributor.tile == 24


def test_what_is_left_is_asked_for_in_its_old_places():
    from fastcam.jobs.local import batches

    status = np.full(70, DONE, dtype=np.uint8)
    status[[3, 40, 41, 69]] = PENDING
    status[50] = FAILED
    found = [(batch.first, batch.rows.tolist()) for batch in batches(status, 64, 16, False)]
    assert found == [(0, [3]), (32, [40, 41]), (64, [69])]
    found = [(batch.first, batch.rows.tolist()) for batch in batches(status, 64, 48, True)]
    assert found == [(0, [3, 40, 41]), (48, [50]), (64, [69])]
    assert [batch.first for batch in batches(status, 64, 16, False, only=[1])] == [64]


NETS = {"lfi_cam": "tiny_lfi"}
EXPLAINING = [name for name, facts in fastcam.methods().items() if "pair" not in facts["explains"]]


@pytest.mark.parametrize("method", EXPLAINING)
def test_every_method_runs_through_a_job(method, tmp_path):
    """Maps of the store are those of `attribute`, for every method that explains single images."""
    if method == "lfi_cam":
        pytest.importorskip("safetensors")
        from fastcam.testbed.models import load

        net, size = load("tiny_lfi"), (32, 32)
    else:
        net, size = NETWORKS(), (16, 16)
    source = Numbered(5, size=size)
    summary = jobs.run(net, source, tmp_path / "a.zarr", method=method, dtype="float32", workers=1)
    assert summary.done == 5, jobs.Store(tmp_path / "a.zarr").errors
    padded = torch.cat([images(source, range(5)), torch.zeros(11, 3, *size)])
    expected = fastcam.attribute(net, padded, method, on_nonfinite="mask")
    store = jobs.Store(tmp_path / "a.zarr")
    for row in range(5):
        torch.testing.assert_close(store.map(row, "input"), expected.maps[row], rtol=1e-5, atol=1e-5)


_SHARED: dict[str, torch.nn.Module] = {}


def NETWORKS():
    return _SHARED.setdefault("gap", tiny())
