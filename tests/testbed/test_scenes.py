"""The generator: the same seed gives the same bits, and masks, boxes and labels say what was really drawn where."""

from __future__ import annotations

import socket
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from fastcam.testbed import make_scenes
from fastcam.testbed import scenes as module

FIELDS = ("images", "labels", "masks", "boxes")


def test_a_scene_depends_on_seed_split_and_index_only():
    many = make_scenes(9, seed=3)
    for index in (0, 4, 8):
        one = make_scenes(1, seed=3, start=index)
        for field in FIELDS:
            assert torch.equal(getattr(one, field)[0], getattr(many, field)[index]), field


def test_seed_split_and_index_each_change_the_scene():
    first = make_scenes(2).images
    for other in (make_scenes(1, seed=1), make_scenes(1, split="train"), make_scenes(1, start=1)):
        assert (other.images[0] - first[0]).abs().mean() > 0.05


def test_the_sequence_is_the_one_the_weights_were_trained_on():
    # Oracle: written down when generator version 1 was fixed; a change here needs a new version and new weights.
    assert module.GENERATOR_VERSION == 1
    scenes = make_scenes(6)
    assert scenes.labels.tolist() == [[2, 9], [4, 9], [1, 8], [9, 5], [5, 6], [3, 0]]
    assert scenes.boxes[0].tolist() == [[21, 55, 39, 81], [24, 18, 40, 44]]
    torch.testing.assert_close(
        scenes.images.mean((1, 2, 3)), torch.tensor([0.3451, 0.2185, 0.3917, 0.3160, 0.4594, 0.9048]), rtol=0, atol=2e-3
    )


def test_types_shapes_and_ranges():
    scenes = make_scenes(40, size=64)
    assert scenes.images.dtype == torch.float32
    assert scenes.images.shape == (40, 3, 64, 64)
    assert scenes.images.is_contiguous()
    assert 0 <= scenes.images.min() <= scenes.images.max() <= 1
    assert scenes.masks.dtype == torch.bool
    assert scenes.masks.shape == (40, 2, 64, 64)
    assert (scenes.labels[:, 0] != scenes.labels[:, 1]).all()
    assert scenes.labels.unique().tolist() == list(range(10))
    assert len(scenes) == 40
    assert len(make_scenes(0)) == 0


def test_masks_and_boxes_are_where_the_ink_is(monkeypatch):
    # Oracle: ink of brightness 100 on backgrounds in [0,1], so a pixel's value is its coverage in percent.
    draw = module._colour
    monkeypatch.setattr(module, "_colour", lambda rng, behind: 0 * draw(rng, behind) + 100)
    scenes = make_scenes(30, region="strokes")
    coverage = scenes.images[:, 0] / 100
    clear = (coverage - 0.5).abs() > 0.011  # the background adds at most 0.01
    assert torch.equal(scenes.masks.any(1)[clear], (coverage > 0.5)[clear])
    for masks, boxes in zip(scenes.masks, scenes.boxes.tolist(), strict=True):
        for mask, box in zip(masks, boxes, strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_each_slot_has_its_own_digit(monkeypatch):
    # Oracle: each digit d is drawn as a full square of coverage 0.6 + 0.03 d in ink of brightness 100.
    monkeypatch.setattr(
        module, "_coverage", lambda rng, split, digit, side: np.full((side, side), 0.6 + 0.03 * digit, np.float32)
    )
    monkeypatch.setattr(module, "_colour", lambda rng, behind: np.full(3, 100, np.float32))
    scenes = make_scenes(20, region="strokes")
    for image, labels, masks in zip(scenes.images, scenes.labels, scenes.masks, strict=True):
        for label, mask in zip(labels, masks, strict=True):
            found = (image[0][mask].mean() - 60) / 3
            assert found.item() == pytest.approx(label.item(), abs=0.2)  # the background adds at most 0.4 / 3


def test_regions_nest_and_objects_stay_apart():
    strokes, grown, boxes = (make_scenes(60, region=region) for region in ("strokes", "grown", "box"))
    assert torch.equal(strokes.images, grown.images)
    assert not (strokes.masks & ~grown.masks).any()
    assert not (strokes.masks & ~boxes.masks).any()
    for scenes in (strokes, grown, boxes):
        assert not (scenes.masks[:, 0] & scenes.masks[:, 1]).any()
        assert scenes.masks.any((2, 3)).all()
    # Oracle: a pixel is in the grown mask iff a stroke is within 3 rows and 3 columns of it.
    ys, xs = strokes.masks[0, 0].nonzero().T
    grid = torch.arange(96)
    near = ((grid.view(-1, 1, 1) - ys).abs() <= 3) & ((grid.view(1, -1, 1) - xs).abs() <= 3)
    assert torch.equal(grown.masks[0, 0], near.any(-1))


def test_splits_share_no_digit():
    train, test = (np.concatenate(module._digits(split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (1347, 450)
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in test}


def test_splits_share_no_background():
    # Oracle: the two parts of each photograph, side by side, are the photograph.
    from importlib.util import find_spec
    from pathlib import Path

    from PIL import Image

    parts = zip(module._photographs("train"), module._photographs("test"), module.PHOTOGRAPHS, strict=True)
    for train, test, (package, name) in parts:
        whole = np.asarray(Image.open(Path(find_spec(package).origin).parent / name).convert("RGB"))
        assert np.array_equal(np.concatenate([np.asarray(train), np.asarray(test)], 1), whole)


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the testbed opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    for cache in (module._digits, module._photographs):
        cache.cache_clear()
    make_scenes(20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count=-1"),
        ({"count": 1, "start": -2}, "start=-2"),
        ({"count": 1, "size": 16}, "at least 32 pixels, got 16"),
        ({"count": 1, "split": "dev"}, "unknown split 'dev'.*train, test"),
        ({"count": 1, "region": "blob"}, "unknown region 'blob'.*grown, strokes, box"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scenes(**arguments)


def test_a_missing_package_names_the_command(monkeypatch):
    module._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*: pip install 'fastcam\[testbed\]'$"):
        make_scenes(1)
