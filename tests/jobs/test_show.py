"""`fastcam show`: which items are chosen, what stands in the panels, and what is said where a picture is gone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastcam
from fastcam import testbed

Image = pytest.importorskip("PIL.Image")
for _package in ("zarr", "safetensors", "matplotlib", "sklearn", "skimage"):
    pytest.importorskip(_package)

from fastcam import render  # noqa: E402
from fastcam.jobs import Store, run  # noqa: E402
from fastcam.jobs.pictures import Pictures, confidences  # noqa: E402
from fastcam.jobs.report import main as report_main  # noqa: E402
from fastcam.jobs.show import main, show  # noqa: E402
from fastcam.jobs.sources import ItemError  # noqa: E402


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A store of eight scenes in class folders and one broken file."""
    root = tmp_path_factory.mktemp("job")
    scenes = testbed.make_scenes(8)
    for index in range(8):
        folder = root / "images" / str(int(scenes.labels[index, 0]))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (scenes.images[index].movedim(0, -1) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"scene-{index}.png")
    # Folders of all classes, so that the folder's place is the digit.
    for digit in range(10):
        (root / "images" / str(digit)).mkdir(exist_ok=True)
        Image.new("RGB", (96, 96), (digit * 20,) * 3).save(root / "images" / str(digit) / "plain.png")
    (root / "images/0/broken.png").write_bytes(b"nothing")
    run("testbed:tiny_resnet", root / "images", root / "maps.zarr", targets="top2", workers=1)
    return root


def test_pictures_are_what_the_network_saw(job):
    store = Store(job / "maps.zarr")
    pictures = Pictures(store)
    row = next(r for r, name in enumerate(store.ids) if "scene" in name)
    with Image.open(job / "images" / store.ids[row]) as file:
        expected = np.asarray(file) / 255
    np.testing.assert_allclose(pictures.view(row).movedim(0, -1), expected, atol=1e-6)
    assert pictures.label(row) == int(store.ids[row].split("/")[0])
    with pytest.raises(ItemError):
        pictures.view(store.ids.index("0/broken.png"))


def test_confidence_is_the_softmax_of_the_label(job):
    store = Store(job / "maps.zarr")
    labels = np.array([int(name.split("/")[0]) for name in store.ids])
    sure = confidences(store, labels)
    scores = torch.from_numpy(store.scores)
    expected = scores.double().softmax(1)[torch.arange(len(store)), torch.from_numpy(labels)]
    done = store.status == 1
    np.testing.assert_allclose(sure[done], expected[done], rtol=1e-9)
    assert np.isnan(sure[~done]).all()
    assert (~done).sum() == 1
    np.testing.assert_allclose(confidences(store)[done], scores.double().softmax(1).amax(1)[done], rtol=1e-9)


def test_the_worst_and_a_class(job, tmp_path):
    store = Store(job / "maps.zarr")
    labels = np.array([int(name.split("/")[0]) for name in store.ids])
    sure = confidences(store, labels)
    paths = show(store, worst=3, out=tmp_path)
    assert [int(path.name[:7]) for path in paths] == np.argsort(np.nan_to_num(sure, nan=9), kind="stable")[:3].tolist()
    only = show(store, class_=4, out=tmp_path)
    assert [int(path.name[:7]) for path in only] == [r for r, label in enumerate(labels) if label == 4]
    assert len(show(store, class_="4", worst=1, out=tmp_path)) == 1


def test_a_panel_holds_picture_and_overlays(job, tmp_path):
    store = Store(job / "maps.zarr")
    row = next(r for r, name in enumerate(store.ids) if "scene" in name)
    (path,) = show(store, items=[store.ids[row]], out=tmp_path)
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB")).astype(int)
    view = Pictures(store).view(row)
    model = testbed.load("tiny_resnet")
    own = fastcam.attribute(model, testbed.normalize(view[None]), "lift_cam", targets="top2")
    np.testing.assert_array_equal(store.targets[row], own.targets[0])
    for target in range(2):
        cell = render.overlay(view, own.maps[0, target])
        expected = np.asarray(Image.fromarray(cell.numpy()).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        found = min(
            np.abs(sheet[top : top + 224, left : left + 224] - expected).mean()
            for top in range(sheet.shape[0] - 224)
            for left in (20 + 224 + 112 + target * 228,)
        )
        assert found < 2  # maps are stored as float16


def test_changed_and_missing_pictures_are_said(job, tmp_path):
    moved = tmp_path / "moved"
    import shutil

    shutil.copytree(job / "images", moved)
    store = Store(job / "maps.zarr")
    Image.new("RGB", (96, 96)).save(moved / "1/plain.png")
    pictures = Pictures(store, moved)
    with pytest.raises(ItemError, match="no longer what was explained"):
        pictures.view(store.ids.index("1/plain.png"))
    assert show(store, items=["1/plain.png"], images=moved, out=tmp_path / "out")[0].is_file()


def test_pictures_are_found_by_id_where_the_list_has_changed(job, tmp_path):
    """One more picture in front shifts all rows; one that is gone is said to be."""
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(job / "images", moved)
    Image.new("RGB", (96, 96)).save(moved / "0/aaa.png")
    (moved / "9/plain.png").unlink()
    store = Store(job / "maps.zarr")
    before, now = Pictures(store), Pictures(store, moved)
    for row, name in enumerate(store.ids):
        if name not in ("0/broken.png", "9/plain.png"):
            assert torch.equal(now.view(row), before.view(row))
            assert now.label(row) == before.label(row)
    gone = store.ids.index("9/plain.png")
    assert now.label(gone) is None
    with pytest.raises(ItemError, match="no such item any more"):
        now.view(gone)


def test_scores_are_read_in_blocks(job, tmp_path, monkeypatch):
    """No read of more rows than a block, and of no score that is not asked for; the figures are those of one read."""
    from fastcam.jobs import pictures, report

    store = Store(job / "maps.zarr")
    expected = confidences(store)
    reads, column = [], store.column("scores")

    class Watched:
        def __getitem__(self, rows):
            reads.append(1 if isinstance(rows, (int, np.integer)) else rows.stop - rows.start)
            return column[rows]

    monkeypatch.setattr(pictures, "ROWS", 4)
    monkeypatch.setitem(store._arrays, "scores", Watched())
    np.testing.assert_array_equal(confidences(store), expected)
    assert (max(reads), sum(reads)) == (4, len(store))
    reads.clear()
    assert len(show(store, worst=2, out=tmp_path)) == 2
    assert (max(reads), sum(reads)) == (4, len(store) + 4)  # and a title a target
    reads.clear()
    report.report(store, tmp_path / "r.html", limit=6)
    assert reads == [4, 2]


def test_folders_that_are_no_classes_of_the_model_are_no_labels(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (len(name),) * 3).save(tmp_path / "images" / name / "x.png")
    given = {"image_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    run("fastcam._testing.jobs:tiny", tmp_path / "images", tmp_path / "maps.zarr", workers=1, **given)
    store = Store(tmp_path / "maps.zarr")
    assert Pictures(store).labels(3).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="no class called 'one'"):
        show(store, class_="one", out=tmp_path)


def test_command(job, tmp_path, capsys):
    store = str(job / "maps.zarr")
    assert main(["show", store, "--item", "0/plain.png", "2", "--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list(tmp_path.iterdir())) == 2
    assert main(["show", store, "--failed"]) == 0
    row = Store(store).ids.index("0/broken.png")
    assert capsys.readouterr().out == f"{row}\t0/broken.png\tno image: 7 bytes that begin with b'nothing'\n"
    for words, reason in (
        (["--item", "nothing.png"], "no item 'nothing.png'"),
        (["--item", "0/broken.png"], "failed: no image"),
        (["--class", "eleven"], "no class called 'eleven'"),
    ):
        assert main(["show", store, *words, "--out", str(tmp_path)]) == 2
        assert reason in capsys.readouterr().err
    assert main(["show", str(tmp_path / "no.zarr"), "--worst", "1"]) == 2
    with pytest.raises(SystemExit):
        main(["show", store])


def test_maps_are_shown_alone_where_the_images_are_gone(job, tmp_path, capsys, caplog):
    """The panel is the map in its colours on black, the page says why there are no pictures."""
    import shutil

    shutil.copytree(job / "images", tmp_path / "images")
    given = {"workers": 1, "limit": 3}
    run("testbed:tiny_resnet", tmp_path / "images", tmp_path / "maps.zarr", **given)
    shutil.rmtree(tmp_path / "images")
    store = Store(tmp_path / "maps.zarr")
    (path,) = show(store, worst=1, out=tmp_path / "out")
    assert "without their pictures: there is nothing at" in caplog.text
    with Image.open(path) as file:
        assert np.asarray(file.convert("RGB")).std() > 10
    assert report_main(["report", str(store.path), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "without pictures: there is nothing at" in page
    assert '"thumbnails":[null,null,null]' in page
    assert main(["show", str(store.path), "--worst", "1", "--images", str(tmp_path / "images")]) == 2


def test_a_store_without_a_map_tells_its_reasons(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(b"nothing")
    for scores in ("all", "targets"):
        out = tmp_path / f"{scores}.zarr"
        run("testbed:tiny_resnet", tmp_path / "images", out, workers=1, scores=scores)
        assert report_main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
        page = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert "2 items: 2 failed" in page
        assert "no image: 7 bytes" in page
        capsys.readouterr()
        assert main(["show", str(out), "--worst", "2", "--out", str(tmp_path / "out")]) == 2
        assert "no map to show: 2 of 2 items failed (reasons: --failed)" in capsys.readouterr().err


def test_images_in_memory_must_be_passed_again(tmp_path):
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = "fastcam._testing.jobs:tiny"
    run(model, images, tmp_path / "maps.zarr", workers=1)
    with pytest.raises(ItemError, match="images="):
        Pictures(Store(tmp_path / "maps.zarr")).view(0)
    assert len(show(tmp_path / "maps.zarr", items=[0, 2], images=images, out=tmp_path)) == 2
