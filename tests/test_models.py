"""Networks by name: weights as they were saved, pictures as the library prepares them, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastcam
from fastcam import testbed
from fastcam._testing.models import gap_linear, torchvision_models
from fastcam.models import Prepare, load_model
from fastcam.models.prepare import ItemError
from fastcam.models.weights import read_weights, weights_hash

Image = pytest.importorskip("PIL.Image")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights.*")
FACTORY = "fastcam._testing.models:gap_linear"


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (31, 57), (224, 224), (1, 1), (500, 7), (257, 256)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_pictures_equal_torchvisions_to_the_bit(size, interpolation):
    torchvision_models()
    from torchvision import transforms

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mode = transforms.InterpolationMode(interpolation)
    for resize, window in ((64, (48, 48)), (40, (48, 32)), ((40, 48), (40, 48))):
        theirs = transforms.Compose(
            [
                *(transforms.Resize(resize, mode), transforms.CenterCrop(window), transforms.ToTensor()),
                transforms.Normalize(mean, std),
            ]
        )
        ours = Prepare(window, resize, interpolation, mean, std)
        assert torch.equal(ours(picture(*size)), theirs(picture(*size)))


def test_pictures_by_the_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    prepare = Prepare((2, 2), (4, 4), "bilinear", (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    expected = (pixels[1:3, 1:3].transpose(2, 0, 1) / 255 - np.array([0.5, 0.25, 0]).reshape(3, 1, 1)) / np.array(
        [0.5, 1, 2]
    ).reshape(3, 1, 1)
    np.testing.assert_allclose(prepare(pixels), expected, atol=1e-6)
    grey = Prepare((4, 4), (4, 4), "bilinear", (0.5,), (0.5,))
    luma = (pixels @ np.array([0.299, 0.587, 0.114]))[None]
    np.testing.assert_allclose(grey(pixels), luma / 127.5 - 1, atol=0.01)
    ready = torch.randn(5, 3, 3, dtype=torch.float64)
    assert torch.equal(prepare(ready), ready.float())


def test_preparation_survives_json_and_pickle():
    prepare = Prepare((2, 3), 7, "bicubic", (0.5,), (0.1,))
    assert Prepare(**json.loads(json.dumps(prepare.describe()))) == prepare == pickle.loads(pickle.dumps(prepare))
    assert Prepare(**dataclasses.asdict(prepare)) == prepare


def test_preparation_is_changed_where_it_is_said():
    own = Prepare((224, 224), 256, "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert own.changed() == own
    assert own.changed(image_size=448).resize == 512
    assert own.changed(image_size=192, crop=1).resize == 192
    assert own.changed(crop=0.5).resize == 448
    assert own.changed(image_size=(100, 200), crop="squash").resize == (100, 200)
    assert own.changed(interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)).mean == (0, 0, 0)
    for wrong in ({"crop": 1.5}, {"crop": "no"}, {"interpolation": "cubic"}, {"mean": (1.0,)}, {"image_size": 0}):
        with pytest.raises(ValueError, match=r"crop|interpolation|mean|size"):
            own.changed(**wrong)


def test_pictures_that_cannot_be_prepared():
    with pytest.raises(ValueError, match="give image_size=, mean= and std="):
        Prepare()(picture(4, 4))
    with pytest.raises(ItemError, match="too narrow"):
        Prepare((224, 224), 256, "bilinear", (0.5,) * 3, (0.5,) * 3)(Image.new("RGB", (60000, 1)))
    fixed = np.zeros((4, 4, 3), np.uint8)
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of numbers it may not write to
        assert Prepare((4, 4), 4, "bilinear", (0.5,) * 3, (0.5,) * 3)(fixed).unique().tolist() == [-1]
    with pytest.raises(ItemError, match="uint8"):
        Prepare((4, 4), 4, "bilinear", (0.5,) * 3, (0.5,) * 3)(np.zeros((4, 4, 2), np.uint8))


def test_testbed():
    loaded = load_model("testbed:tiny_resnet")
    own = testbed.load("tiny_resnet")
    assert loaded.weights_hash == weights_hash(own)
    assert loaded.classes == tuple("0123456789")
    scene = testbed.make_scenes(1).images[0]
    shown = Image.fromarray((scene.movedim(0, -1) * 255).round().byte().numpy())
    torch.testing.assert_close(loaded.prepare(shown), testbed.normalize(scene), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="did you mean 'tiny_resnet'"):
        load_model("testbed:tiny_resnt")


def test_torchvision_with_weights_of_a_file(tmp_path):
    models = torchvision_models()
    own = models.resnet18(num_classes=7)
    safetensors.save_file(own.state_dict(), tmp_path / "w.safetensors")
    wrapped = {"model": {f"module.{name}": value for name, value in own.state_dict().items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = load_model("torchvision:resnet18", weights=tmp_path / name)
        assert loaded.weights_hash == weights_hash(own)
        assert loaded.model.fc.out_features == 7
        assert not loaded.model.training
        assert loaded.classes is None
    prepare = loaded.prepare
    assert (prepare.size, prepare.resize, prepare.interpolation) == ((224, 224), 256, "bilinear")
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    shown = picture(300, 260)
    assert torch.equal(prepare(shown), preset(shown))


def test_torchvisions_entries_by_file_name(tmp_path):
    models = torchvision_models()
    from fastcam.models.libraries import _entry

    entries = models.ResNet50_Weights
    assert _entry(entries, "/x/resnet50-0676ba61.pth") == (entries.IMAGENET1K_V1, False)
    assert _entry(entries, "/x/mine.pth") == (entries.DEFAULT, False)
    assert _entry(entries, "default") == (entries.DEFAULT, True)
    assert _entry(entries, "IMAGENET1K_V1") == (entries.IMAGENET1K_V1, True)


def test_random_weights_are_said_and_repeat():
    torchvision_models()
    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="squeezenet1_1 has random weights"):
        one = load_model("torchvision:squeezenet1_1")
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.warns(UserWarning, match="random"):
        assert load_model("torchvision:squeezenet1_1").weights_hash == one.weights_hash
    assert one.classes[:2] == ("tench", "goldfish")


def test_unknown_names():
    torchvision_models()
    for spec, hint in (
        ("torchvision:resnet8", "did you mean"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier"),
        ("resnet18", "is not understood"),
        ("no_such_module:f", "PYTHONPATH"),
        ("fastcam._testing.models:gap_liner", "did you mean 'gap_linear'"),
        ("fastcam:no.pt2", "no exported program"),
    ):
        with pytest.raises(ValueError, match=hint):
            load_model(spec)
    with pytest.raises(TypeError, match="neither a module"):
        load_model("fastcam._testing.models:CLASSES")
    with pytest.raises(TypeError, match="returned str"):
        load_model("platform:machine")


def test_factories(tmp_path):
    loaded = load_model(FACTORY, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert loaded.weights_hash == weights_hash(gap_linear())
    assert (loaded.image_size, loaded.mean) == ((32, 32), (0.5,) * 3)
    assert loaded.prepare(picture(40, 64)).shape == (3, 32, 32)
    other = gap_linear(seed=1)
    safetensors.save_file(other.state_dict(), tmp_path / "w.safetensors")
    changed = load_model(FACTORY, weights=tmp_path / "w.safetensors")
    assert changed.weights_hash == weights_hash(other) != loaded.weights_hash
    assert pickle.loads(pickle.dumps(changed)).weights_hash == changed.weights_hash


def test_a_module_is_left_as_it_is():
    model = gap_linear().train()
    loaded = load_model(model)
    assert loaded.model is model
    assert model.training
    assert loaded.spec == "Net"
    with pytest.raises(ValueError, match="left as it is"):
        load_model(model, weights="w.safetensors")


def test_the_hash_is_of_names_and_numbers():
    one, other = gap_linear(), gap_linear()
    assert weights_hash(one) == weights_hash(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert weights_hash(one) != weights_hash(other)
    assert weights_hash(one.double()) != weights_hash(gap_linear())


def test_weights_that_do_not_fit(tmp_path):
    state = gap_linear().state_dict()
    first = next(iter(state))
    cases = {
        "missing": ({name: value for name, value in state.items() if name != first}, f"missing: {first}"),
        "more": (state | {"extra.weight": torch.zeros(2)}, "unexpected: extra.weight"),
        "shape": (state | {first: torch.zeros(1, 2)}, r"another shape: .* \(1, 2\) instead of"),
        "nan": (state | {first: state[first] * torch.nan}, f"'{first}' are NaN"),
        "number": ({"lr": 0.1, "step": 3}, "'lr' is float, not a tensor"),
    }
    for name, (content, reason) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=reason):
            load_model(FACTORY, weights=tmp_path / f"{name}.pt")
    poisoned = gap_linear()
    with torch.no_grad():
        next(poisoned.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(ValueError, match=r"1 of \d+ numbers .* NaN or infinite"):
        load_model(poisoned)
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(ValueError, match=r"cannot be read|can be read"):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="no weights at"):
        read_weights(tmp_path / "gone.pt")


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_checkpoints_that_would_run_code_are_refused(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"state_dict": gap_linear().state_dict(), "hook": Evil(marker)}, tmp_path / "new.pth")
    torch.save({"x": Evil(marker)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(marker)))
    torch.save(gap_linear(), tmp_path / "module.pth")
    for name in ("new.pth", "old.pth", "plain.pth", "module.pth"):
        with pytest.raises(ValueError, match=f"{name} is refused: it is pickled code") as told:
            load_model(FACTORY, weights=tmp_path / name)
        assert "save_file" in str(told.value)
    assert not marker.exists()
    torch.load(tmp_path / "new.pth", weights_only=False)["hook"].close()  # the file would have been made
    assert marker.exists()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    images = torch.zeros(2, 3, 16, 16)
    exported = torch.export.export(gap_linear(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(exported, path)
    return path


def test_exported_programs_are_explained_as_their_network(program):
    loaded = load_model(str(program), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert loaded.image_size == (16, 16)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for method, layer in (("lift_cam", None), ("lift_cam", "features.0"), ("grad_cam", "features"), ("lrp", None)):
        ours = fastcam.attribute(loaded.model, images, method, layer=layer)
        own = fastcam.attribute(gap_linear(), images, method, layer=layer)
        assert ours.layer == own.layer
        torch.testing.assert_close(ours.maps, own.maps)
    with pytest.raises(ValueError, match="holds its own weights"):
        load_model(str(program), weights="w.safetensors")


def test_exported_programs_that_cannot_be_used(tmp_path, program):
    fixed = torch.export.export(gap_linear(), (torch.zeros(2, 3, 16, 16),))
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    with pytest.raises(ValueError, match=r"batches of exactly 2 images; .*dynamic_shapes"):
        load_model(str(tmp_path / "fixed.pt2"))
    training = torch.export.export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(),
        (torch.zeros(2, 3, 8, 8),),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    torch.export.save(training, tmp_path / "train.pt2")
    with pytest.raises(ValueError, match="train mode"):
        load_model(str(tmp_path / "train.pt2"))
    (tmp_path / "text.pt2").write_text("no program")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(str(tmp_path / "text.pt2"))
    marker = tmp_path / "ran"
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as copy:
        for name in source.namelist():
            evil = "sample_inputs" in name and name.endswith(".pt")
            copy.writestr(name, pickle.dumps(Evil(marker)) if evil else source.read(name))
    with pytest.raises(ValueError, match="is refused: it holds more than tensors"):
        load_model(str(tmp_path / "evil.pt2"))
    assert not marker.exists()


@pytest.mark.peers
def test_timm(tmp_path):
    torchvision_models()
    timm = pytest.importorskip("timm")
    own = timm.create_model("resnet10t", num_classes=4).eval()
    safetensors.save_file(own.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("timm:resnet10t", weights=tmp_path / "w.safetensors")
    assert loaded.weights_hash == weights_hash(own)
    facts = timm.data.resolve_data_config({}, model=own)
    theirs = timm.data.create_transform(**facts, is_training=False)
    shown = picture(300, 220)
    torch.testing.assert_close(loaded.prepare(shown), theirs(shown), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="did you mean"):
        load_model("timm:resnet10x")


def test_kernel_sources_on_the_path_are_no_kernels_package():
    """transformers imports `kernels` where it finds one, and asks for its version."""
    path = Path(fastcam.__file__).parents[1] / "kernels/__init__.py"
    if not path.is_file():
        pytest.skip("fastcam is not a checkout here")
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(module, "__version__", "none") == "none"
    with pytest.raises(ImportError, match=r"import fastcam\.kernels"):
        module.get_kernel  # noqa: B018


@pytest.mark.peers
def test_transformers(tmp_path):
    torchvision_models()
    transformers = pytest.importorskip("transformers")
    names = {0: "cat", 1: "dog", 2: "emu"}
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names
    )
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "net")
    facts = {"do_resize": True, "size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32, "resample": 3}
    facts |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "net/preprocessor_config.json").write_text(json.dumps(facts))
    loaded = load_model(f"hf:{tmp_path}/net")
    assert loaded.classes == ("cat", "dog", "emu")
    assert loaded.prepare == Prepare((32, 32), 40, "bicubic", (0.5,) * 3, (0.25,) * 3)
    images = torch.stack([loaded.prepare(picture(50, 60, seed)) for seed in range(2)])
    result = fastcam.attribute(loaded.model, images, "grad_cam")
    with torch.no_grad():
        torch.testing.assert_close(result.scores.logits, model(images).logits)
    with pytest.raises(ValueError, match="weights='default' allows the download"):
        load_model("hf:nobody/nothing-here")


def test_missing_packages_end_with_the_command(monkeypatch):
    for package, spec in (("timm", "timm:resnet18"), ("transformers", "hf:x")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"pip install .*{package}"):
            load_model(spec)
