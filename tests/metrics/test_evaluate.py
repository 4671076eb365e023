"""Evaluations: the numbers are the metrics', the files hold them, the command makes them, also from a store."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastcam
from fastcam import metrics
from fastcam.cli import main
from fastcam.metrics import report, stored
from fastcam.metrics.evaluate import METRICS, Batch, Evaluation, Settings, evaluate
from fastcam.models.prepare import Prepare

from .conftest import draw


@pytest.fixture
def masks(maps):
    return (draw(3, 6, 7, seed=8) > 0.5).contiguous()


def test_values_are_the_metrics(model, images, maps, targets, masks):
    asked = {"fractions": (0.2, 0.6), "tolerance": 2, "threshold": 0.3, "noise": 0.1, "radius": 0.3, "samples": 2}
    settings = Settings(steps=6, seed=3, method="a_fmi", **asked)
    parts = [Batch(images[:2], maps[:2], targets[:2], masks[:2], ["a", "b"]), Batch(images[2:], maps[2:], 4, masks[2:])]
    found = evaluate(model, parts, list(METRICS), settings, {"note": "test"})
    assert found.ids == ["a", "b", "2"]
    assert found.facts == {"note": "test"}
    want = {
        "average_drop": metrics.average_drop(model, images, maps, targets),
        "increase_in_confidence": metrics.increase_in_confidence(model, images, maps, targets),
        "average_drop_in_deletion": metrics.average_drop_in_deletion(model, images, maps, targets),
        "insertion_auc": metrics.insertion_auc(model, images, maps, targets, steps=6),
        "deletion_auc": metrics.deletion_auc(model, images, maps, targets, steps=6),
        "road": metrics.road(model, images, maps, targets, fractions=(0.2, 0.6), noise=0.1, seed=3),
        "most_relevant_first": metrics.most_relevant_first(model, images, maps, targets).scores.mean(1),
        "pointing_game": metrics.pointing_game(maps, masks, tolerance=2),
        "energy_pointing": metrics.energy_pointing(maps, masks),
        "outside_inside_ratio": metrics.outside_inside_ratio(maps, masks),
        "localisation_iou": metrics.localisation_iou(maps, masks, threshold=0.3),
        "average_precision": metrics.average_precision(maps, masks),
        "sparsity": metrics.sparsity(maps),
        "max_sensitivity": metrics.max_sensitivity(
            fastcam.Explainer(model, "a_fmi"), images, targets, radius=0.3, samples=2, seed=3
        ),
        "randomisation": metrics.cascading_randomisation(
            model, images, targets, method="a_fmi", seed=3
        ).similarity.nanmean(0),
        "shap_agreement": metrics.shap_agreement(
            *(fastcam.attribute(model, images, name, targets=targets).weights for name in ("a_fmi", "shap_cam"))
        ),
    }
    assert set(want) == set(METRICS)
    for name, values in want.items():
        np.testing.assert_allclose(found.values[name], values.numpy(), rtol=1e-9, err_msg=name)
    fractions, mean = found.curves["insertion"]
    curve = metrics.insertion_deletion(model, images, maps, targets, steps=6)[0]
    assert fractions == curve.fractions.tolist()
    torch.testing.assert_close(mean.mean, curve.scores.mean(0))


def test_rows_files_and_picture(model, images, maps, targets, masks, tmp_path):
    broken = maps.clone()
    broken[1] = math.nan
    found = evaluate(model, [Batch(images, broken, targets, masks)], ["deletion_auc", "outside_inside_ratio"])
    (row, _), values = found.rows(), [found.values["deletion_auc"][i] for i in (0, 2)]
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(2))
    assert (row["low"], row["high"]) == pytest.approx((row["mean"] - 1.96 * row["standard_error"],
                                                      row["mean"] + 1.96 * row["standard_error"]))  # fmt: skip
    assert (row["n"], row["left_out"], row["better"]) == (2, 1, "lower")
    paths = report.write(found, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["evaluation.json", "evaluation.csv", "evaluation.md", "curves.png"]
    document = json.loads(paths[0].read_text())
    assert document["results"][0]["mean"] == row["mean"]
    assert document["items"]["values"]["deletion_auc"][1] is None
    assert document["items"]["ids"] == ["0", "1", "2"]
    assert len(document["curves"]["deletion"]["mean"]) == len(document["curves"]["deletion"]["fractions"])
    table = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [line["metric"] for line in table] == ["deletion_auc", "outside_inside_ratio"]
    assert float(table[0]["mean"]) == row["mean"]
    assert f"| deletion_auc ↓ | {row['mean']:.4f} ± {row['standard_error']:.4f} |" in paths[2].read_text()
    from PIL import Image

    with Image.open(paths[3]) as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    no_curves = evaluate(None, [Batch(images, maps, targets)], ["sparsity"])
    assert [path.name for path in report.write(no_curves, tmp_path / "new" / "folder")][-1] == "evaluation.md"
    assert not paths[3].exists()  # the picture of the evaluation before
    for count, median in ((3, 2.0), (4, 3.5), (5, 5.0), (6, math.inf)):
        values = [1.0, 2.0, 5.0, math.inf, math.inf, math.inf][:count] if count > 4 else [5.0, 1.0, 2.0, 7.0][:count]
        assert Evaluation({"sparsity": values}, [], {}, {}).rows()[0]["median"] == median


@pytest.mark.parametrize("shape", [(12,), (2, 2, 3)])
def test_signals_and_volumes_have_one_value_a_map(shape):
    values = torch.arange(24.0).reshape(2, *shape).flip(-1)
    masks = values % 3 == 1
    names = ["sparsity", "pointing_game", "energy_pointing", "average_precision"]
    batch = Batch(torch.zeros(2, 3, *shape), values, 0, masks)
    found = evaluate(None, [batch], names)
    plane = values.reshape(2, 1, 12), masks.reshape(2, 1, 12)
    assert found.ids == ["0", "1"]
    assert found.values["sparsity"] == metrics.sparsity(plane[0]).tolist()
    assert found.values["sparsity"][0] == pytest.approx(13 / 36)  # of 0 to 11: (n + 1) / (3 n)
    for name in names[1:]:
        assert found.values[name] == getattr(metrics, name)(*plane).tolist()
    with pytest.raises(ValueError, match="do not fit maps"):
        evaluate(None, [batch._replace(masks=masks[..., 1:])], names)
    if len(shape) == 3:
        with pytest.raises(ValueError, match="in volumes it must be 0"):
            evaluate(None, [batch], names, Settings(tolerance=1))


def test_several_targets_are_explained_one_by_one(model, images):
    """And where the store has no map for a target, no number."""
    targets = torch.tensor([[2, 0], [0, 1], [4, 3]])
    explained = fastcam.attribute(model, images, "grad_cam", targets=targets)
    maps = explained.maps.clone()
    maps[1, 1] = torch.nan
    names = ["max_sensitivity", "randomisation", "shap_agreement"]
    settings = Settings(method=lambda network: fastcam.Explainer(network, "grad_cam", layer="features"), samples=2)
    found = evaluate(model, [Batch(images, maps, targets)], names, settings)
    alone = [
        evaluate(model, [Batch(images, explained.maps[:, column], targets[:, column])], names, settings)
        for column in (0, 1)
    ]
    for name in names:
        want = torch.tensor([one.values[name] for one in alone]).T.flatten()
        assert want.isfinite().all()
        want[3] = torch.nan
        np.testing.assert_allclose(found.values[name], want.numpy(), rtol=1e-6, err_msg=name)
    assert "method" not in found.settings


def test_errors(model, images, maps, targets):
    batch = [Batch(images, maps, targets)]
    with pytest.raises(ValueError, match="did you mean 'deletion_auc'"):
        evaluate(model, batch, ["deletion_auk"])
    with pytest.raises(ValueError, match="metric 'road' perturbs images and needs the model"):
        evaluate(None, batch, ["sparsity", "road"])
    with pytest.raises(ValueError, match="metric 'pointing_game' compares maps with masks"):
        evaluate(model, batch, ["pointing_game"])
    with pytest.raises(ValueError, match="no batch came"):
        evaluate(model, [], ["sparsity"])
    with pytest.raises(ValueError, match="metrics names none"):
        evaluate(model, batch, [])
    with pytest.raises(ValueError, match="metric 'randomisation' explains again and needs the model"):
        evaluate(None, batch, ["randomisation"])
    with pytest.raises(ValueError, match=r"metric 'max_sensitivity' explains again: pass Settings\(method=\)"):
        evaluate(model, batch, ["max_sensitivity"])
    with pytest.raises(ValueError, match="method 'hires_cam' gives none"):
        evaluate(model, batch, ["shap_agreement"], Settings(method="hires_cam"))


class Shelf:
    """A store and its source of images, as far as an evaluation reads them."""

    def __init__(self, images, maps, targets):
        self.ids = np.array(["a/one.jpg", "two.jpg", "a/three.jpg"])
        self.status, self.targets = np.array([1, 2, 1]), targets.numpy()
        self.digests = ["one", "two", "three"]
        self._images, self._maps = images, maps

    def map(self, item, size):
        assert size == "input"
        return self._maps[item]

    def __len__(self):
        return 3

    def key(self, index):
        return str(self.ids[::-1][index])  # in another order than the store

    def load(self, index):
        return SimpleNamespace(image=self._images[2 - index], digest=("one", "two", "three")[2 - index])


def test_a_store_is_read_with_its_images_and_masks(model, images, maps, targets, masks, tmp_path, caplog):
    from PIL import Image

    model, images = model.float(), images.float()
    shelf = Shelf(images, maps, targets)
    (tmp_path / "a").mkdir()
    Image.fromarray(masks[0].numpy().astype(np.uint8) * 255).save(tmp_path / "a" / "one.png")
    found = evaluate(
        model, stored.batches_of(shelf, shelf, Prepare(), masks=tmp_path, batch_size=1),
        ["deletion_auc", "energy_pointing"],
    )  # fmt: skip
    assert found.ids == ["a/one.jpg", "a/three.jpg"]
    keep = torch.tensor([0, 2])
    want = metrics.deletion_auc(model, images[keep], maps[keep], targets[keep])
    np.testing.assert_allclose(found.values["deletion_auc"], want.numpy())
    assert found.values["energy_pointing"][0] == pytest.approx(metrics.energy_pointing(maps[0], masks[0]).item())
    assert math.isnan(found.values["energy_pointing"][1])
    assert "1 of 2 items have no mask" in caplog.text
    one = list(stored.batches_of(shelf, shelf, Prepare(), limit=1))
    assert [batch.ids for batch in one] == [["a/one.jpg"]]
    other = Shelf(images, maps, targets)
    other.ids = np.array(["x", "y", "z"])
    with pytest.raises(ValueError, match=r"item 'a/one\.jpg' of the store is not among the images"):
        next(stored.batches_of(shelf, other, Prepare()))
    with pytest.raises(ValueError, match="there is no folder "):
        next(stored.batches_of(shelf, shelf, Prepare(), masks=tmp_path / "nowhere"))
    shelf.digests[2] = "another"
    with pytest.raises(ValueError, match=r"item 'a/three\.jpg' is no longer what was explained"):
        list(stored.batches_of(shelf, shelf, Prepare()))
    shelf.status[:] = 2
    with pytest.raises(ValueError, match="none of the store's 3 items is done"):
        next(stored.batches_of(shelf, shelf, Prepare()))
    Image.fromarray(masks[0].numpy().astype(np.uint8) * 255).save(tmp_path / "outside.png")
    assert stored.read_mask(tmp_path / "a", "../outside.jpg", images[0], Prepare()) is None  # names stay in the folder
    with pytest.raises(ValueError, match=r"mask .*outside\.png must be 8 x 7 \(H x W\), as the picture; it is 6 x 7"):
        stored.read_mask(tmp_path, "outside.jpg", images[0, :, :1].expand(3, 8, 7), Prepare())


def test_a_mask_is_cut_as_its_picture_is(tmp_path):
    from PIL import Image

    seen = np.zeros((40, 90), dtype=np.uint8)
    seen[5:30, 20:50] = 255  # cut off at the left by the middle 32 x 32 of 32 x 72
    Image.fromarray(seen).save(tmp_path / "photo.png")
    picture = Image.fromarray(np.repeat(seen[..., None], 3, axis=2))
    prepare = Prepare(size=(32, 32), resize=32, interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3)
    want = prepare(picture)[0] > 0.5
    assert 0 < want.sum() < 20 * 24
    assert torch.equal(stored.read_mask(tmp_path, "photo.jpg", picture, prepare), want)
    assert torch.equal(stored.read_mask(tmp_path, "photo.jpg", np.asarray(picture), prepare), want)
    Image.fromarray(want.numpy()).save(tmp_path / "photo.png")  # of the prepared size: as it is
    assert torch.equal(stored.read_mask(tmp_path, "photo.jpg", picture, prepare), want)
    (tmp_path / "photo.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"mask .*photo\.png cannot be read"):
        stored.read_mask(tmp_path, "photo.jpg", picture, prepare)


def test_the_command_on_the_testbed(capsys, tmp_path):
    for package in ("sklearn", "skimage", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    arguments = ["evaluate", "--model", "testbed:tiny_resnet", "--method", "grad_cam", "--limit", "3", "--steps", "4"]
    asked = ["--metrics", "pointing_game,insertion_auc, sparsity", "--out", str(tmp_path)]
    assert main([*arguments, *asked]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].startswith("| pointing_game ↑ | ")
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["facts"] == {"model": "testbed:tiny_resnet", "method": "grad_cam"}
    assert document["settings"]["output"] == "sigmoid"
    assert document["items"]["ids"] == [f"scene {i}" for i in (0, 0, 1, 1, 2, 2)]
    from fastcam import attribute
    from fastcam.testbed import load, make_scenes, normalize

    net, scenes = load("tiny_resnet"), make_scenes(3)
    maps = attribute(net, normalize(scenes.images), "grad_cam", targets=scenes.labels).maps
    want = metrics.insertion_auc(net, normalize(scenes.images), maps, scenes.labels, steps=4, output="sigmoid")
    np.testing.assert_allclose(document["items"]["values"]["insertion_auc"], want.flatten().numpy(), atol=1e-6)
    hits = metrics.pointing_game(maps, scenes.masks).flatten().tolist()
    assert document["items"]["values"]["pointing_game"] == hits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "grad_cam", "--model", "testbed:tiny_resnet", "--metrics", "roads"], "did you mean 'road'"),
        (["--method", "grad_cam", "--model", "resnet50"], "pass --model testbed:NAME, not 'resnet50'"),
        (["--method", "grad_cam", "--model", "testbed:tiny_vgg", "--limit", "0"], "--limit must be at least 1; got 0"),
        (["--method", "cam", "--model", "testbed:tiny_vgg", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--method", "grad_kam", "--model", "testbed:tiny_vgg"], "did you mean 'grad_cam'"),
    ],
)
def test_wrong_usage_is_named(words, message, capsys, tmp_path):
    pytest.importorskip("safetensors")
    assert main(["evaluate", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_command_on_the_store_of_a_job(capsys, tmp_path):
    for package in ("zarr", "sklearn", "skimage", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    from PIL import Image

    from fastcam import Explainer, attribute, jobs
    from fastcam.testbed import load, make_scenes, normalize

    scenes = make_scenes(5)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(5):
        pixels = (scenes.images[i].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        mask = scenes.masks[i, 0].to(torch.uint8).mul(255).numpy()
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    store = tmp_path / "maps.zarr"
    jobs.run("testbed:tiny_resnet", str(tmp_path / "images"), str(store), method="grad_cam", dtype="float32")
    names = "energy_pointing,deletion_auc,average_drop,max_sensitivity,shap_agreement"
    words = [
        "--maps",
        str(store),
        "--masks",
        str(tmp_path / "masks"),
        "--metrics",
        names,
        "--steps",
        "4",
        "--samples",
        "2",
    ]
    assert main(["evaluate", *words, "--limit", "4", "--batch-size", "3", "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert document["items"]["ids"] == [f"{i}.png" for i in range(4)]
    assert document["facts"]["method"] == "grad_cam"
    net = load("tiny_resnet")
    images = normalize((scenes.images[:4] * 255).round() / 255)
    result = attribute(net, images, "grad_cam")
    want = {
        "energy_pointing": metrics.energy_pointing(result.maps, scenes.masks[:4, 0]),
        "deletion_auc": metrics.deletion_auc(net, images, result.maps, result.targets, steps=4),
        "average_drop": metrics.average_drop(net, images, result.maps, result.targets),
        "max_sensitivity": metrics.max_sensitivity(Explainer(net, "grad_cam"), images, result.targets, samples=2),
        "shap_agreement": metrics.shap_agreement(
            result.weights, attribute(net, images, "shap_cam", targets=result.targets).weights
        ),
    }
    for name, values in want.items():
        np.testing.assert_allclose(document["items"]["values"][name], values.numpy(), atol=1e-4, err_msg=name)
    capsys.readouterr()
    assert main(["evaluate", "--maps", str(store), "--model", "testbed:tiny_vgg", "--out", str(tmp_path)]) == 2
    assert "the maps explain other weights of 'testbed:tiny_resnet'" in capsys.readouterr().err
    assert main(["evaluate", *words, "--out", str(tmp_path / "images" / "0.png")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
    assert main(["evaluate", "--maps", str(tmp_path / "none.zarr"), "--out", str(tmp_path)]) == 2
    assert "none.zarr holds no store" in capsys.readouterr().err
