"""Training: learns, survives being killed, refuses what does not fit; images from folders and from the testbed."""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastcam import cli
from fastcam.nn import LFICAM
from fastcam.nn.data import Stored, augmented, digits, image_folder
from fastcam.nn.train import Recipe, evaluate, lfi_cam_of, load, main, train

PIL = pytest.importorskip("PIL.Image")


def stripes(count: int = 96, seed: int = 0) -> Stored:
    """Three classes: the channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.rand((count, 3, 16, 16), generator=generator)
    images[torch.arange(count), labels] += 0.6
    return Stored(images, labels)


def small() -> LFICAM:
    torch.manual_seed(0)
    return LFICAM(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()), 3, channels=8)


RECIPE = Recipe(epochs=4, batch=16, rate=0.1, drops=(3,), size=16, augment="crop", validation=0.25)


def test_learns_and_ends_with_the_best_epoch():
    model, images = small(), stripes()
    report = train(model, images, RECIPE)
    assert len(report.losses) == 4
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.validation[report.best] == max(report.validation)
    assert not model.training
    assert evaluate(model, stripes(30, 1), RECIPE) >= 0.9


def test_everything_follows_from_the_seed(tmp_path):
    states = []
    for workers in (1, 3):
        model = small()
        train(model, stripes(), RECIPE, workers=workers)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


class Stop(Exception):
    pass


def test_stopped_after_any_epoch_it_ends_with_the_same_weights(tmp_path):
    whole = small()
    expected = train(whole, stripes(), RECIPE)
    for stop in (1, 2, 3):

        def note(line: str, stop: int = stop) -> None:
            if line.startswith(f"epoch {stop + 1} "):
                raise Stop

        folder = tmp_path / str(stop)
        with pytest.raises(Stop):
            train(small(), stripes(), RECIPE, folder, note=note)
        model = small()
        with torch.no_grad():
            model.fc.weight.zero_()  # where it starts does not matter once there is a checkpoint
        found = train(model, stripes(), RECIPE, folder, resume=True)
        assert found.losses == expected.losses
        assert all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    """Each run a process of its own, forked from one that has imported everything."""
    rng = random.Random(0)
    for number in range(24):
        noise = torch.tensor([rng.randrange(256) for _ in range(3 * 32 * 32)], dtype=torch.uint8)
        folder = tmp_path / "data" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        PIL.fromarray(noise.reshape(32, 32, 3).numpy()).save(folder / f"{number}.png")
    words = ["--data", str(tmp_path / "data"), "--network", "resnet8", "--epochs", "6", "--batch", "8", "--drops", "4"]
    words += ["--validation", "0.2", "--threads", "1", "--workers", "1", "--resume", "--out"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastcam.nn.train", "torch._dynamo"])

    def run(out):
        process = context.Process(target=main, args=([*words, str(tmp_path / out)],))
        process.start()
        return process

    def finished(out):
        begin = time.perf_counter()
        process = run(out)
        process.join(240)
        assert process.exitcode == 0
        return time.perf_counter() - begin

    finished("first")  # what the first of all does once
    length = finished("whole")
    for _ in range(3):
        process = run("killed")
        process.join(rng.uniform(0.3, 1) * length)
        process.kill()
        process.join()
    finished("killed")
    one, other = (load(tmp_path / name / "best.pt")[0].state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_is_never_torn(tmp_path, monkeypatch):
    """A full disk in the middle of a write leaves the last complete checkpoint, and the run goes on from it."""

    def note(line: str) -> None:
        if line.startswith("epoch 3 "):
            raise Stop

    with pytest.raises(Stop):
        train(small(), stripes(), RECIPE, tmp_path, note=note)
    before = (tmp_path / "last.pt").read_bytes()

    def full(document, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            train(small(), stripes(), RECIPE, tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    whole = train(small(), stripes(), RECIPE)
    assert train(small(), stripes(), RECIPE, tmp_path, resume=True).losses == whole.losses


def test_another_recipe_or_a_forgotten_resume_is_refused(tmp_path):
    train(small(), stripes(), RECIPE, tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        train(small(), stripes(), RECIPE, tmp_path)
    with pytest.raises(ValueError, match=r"another recipe: rate was 0.1, is 0.2"):
        train(small(), stripes(), replace(RECIPE, rate=0.2), tmp_path, resume=True)


def test_a_run_may_be_made_longer(tmp_path):
    train(small(), stripes(), replace(RECIPE, epochs=2), tmp_path)
    found, whole = small(), small()
    report = train(found, stripes(), RECIPE, tmp_path, resume=True)
    assert report.losses == train(whole, stripes(), RECIPE).losses
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), whole.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"has 4 epochs behind it, more than epochs=3"):
        train(found, stripes(), replace(RECIPE, epochs=3), tmp_path, resume=True)


def test_bad_data(tmp_path):
    with pytest.raises(ValueError, match="make no batch of 16"):
        train(small(), stripes(18), RECIPE)
    with pytest.raises(ValueError, match="smaller than the views' side 32"):
        train(small(), stripes(), Recipe(epochs=1, batch=16, size=32, augment="none"))
    broken = stripes()
    broken.images[:] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite in epoch 1"):
        train(small(), broken, RECIPE)


def test_other_images_are_refused(tmp_path):
    train(small(), stripes(), RECIPE, tmp_path)
    with pytest.raises(ValueError, match="other images: images was 96, is 64"):
        train(small(), stripes(64), RECIPE, tmp_path, resume=True)
    moved = Stored(stripes().images, stripes().labels.flip(0))
    with pytest.raises(ValueError, match="other images: labels was"):
        train(small(), moved, RECIPE, tmp_path, resume=True)
    with pytest.raises(ValueError, match="another network"):
        train(LFICAM(nn.Conv2d(3, 4, 3), 3), stripes(), RECIPE, tmp_path, resume=True)


# ---- images ----


def folder_of(root, sizes=((20, 18), (40, 17))):
    for label, name in enumerate(("beech", "ash")):
        for number, size in enumerate(sizes):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.new("RGB", size, (250 * label, 0, 100)).save(path)
    return root


def test_image_folder(tmp_path):
    images, names = image_folder(folder_of(tmp_path), resize=16)
    assert names == ["ash", "beech"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.image(0).shape == (3, 16, 18)
    assert images.image(1).shape == (3, 16, 38)
    torch.testing.assert_close(images.image(3)[:, 0, 0], torch.tensor([0, 0, 100 / 255]))
    ramp = np.linspace(0, 1, 16 * 18).reshape(16, 18)
    PIL.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "ash" / "0.png")
    torch.testing.assert_close(images.image(0)[0], torch.tensor(ramp, dtype=torch.float32), rtol=0, atol=0.003)
    PIL.new("RGBA", (16, 18), (9, 9, 9, 0)).save(tmp_path / "ash" / "0.png")
    assert bool((images.image(0) == 1).all())
    turned = PIL.Exif()
    turned[0x0112] = 6  # a quarter to the right
    PIL.new("RGB", (16, 18)).save(tmp_path / "ash" / "0.png", exif=turned)
    assert images.image(0).shape == (3, 16, 18)
    (tmp_path / "beech" / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read the image .*beech/0.png"):
        images.image(2)
    (tmp_path / "oak").mkdir()
    with pytest.raises(ValueError, match="oak holds no images"):
        image_folder(tmp_path)
    with pytest.raises(ValueError, match="holds no folders"):
        image_folder(tmp_path / "oak")


def test_views():
    image = torch.arange(3 * 20 * 24, dtype=torch.float32).reshape(3, 20, 24)
    assert torch.equal(augmented(image, 16, "none", (0,)), image[:, 2:18, 4:20])
    seen = {tuple(augmented(image, 16, "crop+flip", (0, 0, i))[0, 8].tolist()) for i in range(40)}
    assert len(seen) > 20
    assert any(row[3] > row[4] > 0 for row in seen)  # mirrored
    for i in range(20):
        row = augmented(image, 16, "crop", (0, i))[0, 8]
        inside = row[row > 0]
        assert torch.equal(inside, inside.sort().values)  # never mirrored
    for i in range(20):
        view = augmented(image, 16, "resized", (1, i))
        assert view.shape == (3, 16, 16)
        assert view.amax() <= image.amax() + 1e-3
    assert torch.equal(augmented(image, 16, "resized", (1, 5)), augmented(image, 16, "resized", (1, 5)))


# ---- the command ----


def test_command_on_a_folder(tmp_path, capsys):
    data = folder_of(tmp_path / "data", sizes=[(16, 16)] * 12)
    words = ["train-lficam", "--data", str(data), "--test", str(data), "--network", "resnet8", "--size", "16"]
    words += ["--epochs", "1", "--batch", "8", "--drops", "", "--out", str(tmp_path / "run"), "--validation", "0.2"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "epoch 1 of 1: loss" in text
    assert "on 24 images" in text
    model, facts = load(tmp_path / "run" / "best.pt")
    assert facts["identity"]["classes"] == ["ash", "beech"]
    assert model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 2)
    assert cli.main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0
    assert cli.main([*words, "--resume", "--plain"]) == 2
    assert "another network or other images: built was" in capsys.readouterr().err
    fresh = [*words, "--out", str(tmp_path / "other")]
    one = tmp_path / "one"
    (one / ".cache").mkdir(parents=True)
    (one / "beech").symlink_to(data / "beech")
    for more, message in (
        (["--network", "vgg"], "unknown network 'vgg'"),
        (["--data", str(tmp_path / "nothing")], "there is no folder"),
        (["--data", str(one)], "holds the class 'beech' alone"),
        (["--test", str(tmp_path / "nothing"), "--epochs", "1000"], "there is no folder"),  # before it trains
        (["--std", "0,1,1"], "std must be one or three positive numbers; got 0.0, 1.0, 1.0"),
        (["--mean", "1,2"], "mean must be one or three finite numbers; got 1.0, 2.0"),
        (["--workers", "0"], "--workers must be at least 1; got 0"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--validation", "1.5"], "validation must lie in"),
        (["--validation", "0.01"], "validation=0.01 of 24 images holds out none; pass at least 0.042, or 0"),
        (["--drops", "x"], "--drops must be whole numbers with commas between them, such as 150,225; got 'x'"),
        (["--drops", "7.5"], "--drops must be whole numbers"),
        (["--mean", "0.5,half,0.5"], "--mean must be numbers with commas between them"),
        (["--rate", "1e20"], "not finite in epoch"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
    ):
        assert cli.main([*fresh, *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run" / "last.pt").write_bytes(b"half a file")
    assert cli.main([*words, "--resume"]) == 2


def test_test_images_are_numbered_by_class_names(tmp_path, capsys):
    """Training has classes a, b, c; the test images of b and c alone must not be taken for a and b."""
    for part, names in (("train", "abc"), ("test", "bc"), ("odd", "xy")):
        for name in names:
            for number in range(12):
                path = tmp_path / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                level = {"a": 0, "b": 120, "c": 250}.get(name, 0)
                PIL.new("RGB", (16, 16), (level, 255 - level, 0)).save(path)
    words = ["train-lficam", "--data", str(tmp_path / "train"), "--network", "resnet8", "--size", "16", "--batch", "8"]
    words += ["--epochs", "8", "--drops", "7", "--validation", "0", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--test", str(tmp_path / "test")]) == 0
    text = capsys.readouterr().out
    assert float(text.split("test accuracy ")[1].split()[0]) >= 0.9
    assert "held-out" not in text
    assert "kept epoch 8, the last one: no images were held out" in text
    assert cli.main([*words, "--resume", "--test", str(tmp_path / "odd")]) == 2
    assert "class 'x' of the test images" in capsys.readouterr().err


def test_command_on_the_testbed(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    module = sys.modules[train.__module__]
    monkeypatch.setattr(module, "digits", lambda count, **more: digits(min(count, 40), **more))
    words = ["train-lficam", "--data", "testbed", "--network", "resnet8", "--epochs", "1", "--batch", "8"]
    assert cli.main([*words, "--drops", "", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "test accuracy" in text
    assert "on 40 images" in text
    assert load(tmp_path / "run" / "best.pt")[1]["identity"]["classes"] == [str(digit) for digit in range(10)]


def test_networks_by_name():
    model = lfi_cam_of("densenet10", 7, 32)
    assert model(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 7)
    assert lfi_cam_of("resnet8", 7, 32, branch=False).attention is False
    with pytest.raises(ValueError, match="unknown library 'keras'"):
        lfi_cam_of("keras:resnet18", 7, 224)
    with pytest.raises(ValueError, match="depth must be 6 n"):
        lfi_cam_of("resnet21", 7, 32)
