"""Methods that cannot explain one of the demo's networks are rows with a reason, whatever kind of error says so."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("safetensors")
pytest.importorskip("zarr")

import fastcam
from fastcam.jobs import writer
from fastcam.testbed import demo, load, make_scenes


def test_methods_that_do_not_apply_are_rows_with_a_reason(tmp_path):
    """RSP is for chains of convolutions (an unsupported operation), CAM for pooled linear heads (a bad value)."""
    scenes = make_scenes(2)
    (row,) = demo.measure("tiny_resnet", load("tiny_resnet"), scenes, ["rsp"], tmp_path)
    assert "no relevance rule for aten::add" in row.reason
    assert math.isnan(row.pointing)
    (row,) = demo.measure("tiny_vgg", load("tiny_vgg"), scenes, ["cam"], tmp_path)
    assert "cam needs a head" in row.reason
    assert not list(tmp_path.iterdir())
    assert "rsp" in fastcam.methods()


def test_a_store_of_an_older_demo_is_made_anew(tmp_path):
    """As one by other weights is; a folder that is none of the demo's is left alone."""
    scenes, model = make_scenes(2), load("tiny_resnet")
    demo.measure("tiny_resnet", model, scenes, ["cam"], tmp_path)
    out = tmp_path / "tiny_resnet-cam.zarr"
    writer.write_facts(out, writer.facts_of(out) | {"weights_hash": "of others"})
    (row,) = demo.measure("tiny_resnet", model, scenes, ["cam"], tmp_path)
    assert row.explained == 2
    (row,) = demo.measure("tiny_resnet", model, scenes, ["cam"], tmp_path)
    assert row.explained == 0
    writer.write_facts(out, writer.facts_of(out) | {"source": {"kind": "folder"}})
    with pytest.raises(writer.JobError, match="made by another job"):
        demo.measure("tiny_resnet", model, scenes, ["cam"], tmp_path)
