"""The public contract: what comes back, what is refused, and that the user's model is left as it was."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam.program.capture import CaptureError, capture


class Small(nn.Module):
    """Two conv stages and pool + linear; `layer1` has an inner head, `layer2` a closed form."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.drop(self.layer2(self.layer1(x)).mean((2, 3))))


class Branching(Small):
    """The same network with a data-dependent branch, which cannot be captured."""

    def forward(self, x):
        if x.abs().sum() < 0:
            return x
        return super().forward(x)


#: Methods that explain pixels unless a layer is named, and methods that cannot do with a forward hook.
OF_ANY_NETWORK = [name for name, facts in fastcam.methods().items() if facts["explains"] == "images"]
PIXELS = {"deep_lift", "full_grad", "lrp", "clrp", "sglrp", "rap", "guided_backprop", "deconvnet"}
PIXELS |= {"attribution_equilibrium", "rsp"}
NEED_CAPTURE = {"lift_cam", "a_fmi", "relevance_cam"} | PIXELS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(1))


def test_attribution_contract(model, images):
    result = fastcam.attribute(model, images, "grad_cam")
    assert result.maps.shape == (3, 12, 10)
    assert result.raw.shape == (3, 6, 5)
    assert result.weights.shape == (3, 8)
    assert result.delta is None
    assert torch.equal(result.scores, model(images))
    assert torch.equal(result.targets, model(images).argmax(1))
    assert result.valid.tolist() == [True, True, True]
    assert (result.layer, result.method) == ("layer2", "grad_cam")
    assert result.options["relu"] is True
    assert result.maps.amin((1, 2)).tolist() == [0, 0, 0]
    assert result.maps.amax((1, 2)).tolist() == [1, 1, 1]
    assert not result.maps.requires_grad
    assert not result.scores.requires_grad
    with pytest.raises(AttributeError):
        result.maps = None
    assert repr(result) == "Attribution(method='grad_cam', layer='layer2', maps=(3, 12, 10) torch.float32)"


def test_values_by_hand(model, images):
    """maps = minmax(resize(relu(sum_k W[c,k] / Z A_k)))."""
    with torch.no_grad():
        features = model.layer2(model.layer1(images))
        raw = torch.relu(torch.einsum("k,bkhw->bhw", model.fc.weight[2] / 30, features))
        resized = functional.interpolate(raw[:, None], (12, 10), mode="bilinear", align_corners=False)[:, 0]
    result = fastcam.attribute(model, images, "grad_cam", targets=2)
    torch.testing.assert_close(result.weights, (model.fc.weight[2] / 30).detach().expand(3, -1))
    torch.testing.assert_close(result.raw, raw)
    low, high = resized.amin((1, 2), keepdim=True), resized.amax((1, 2), keepdim=True)
    torch.testing.assert_close(result.maps, (resized - low) / (high - low))
    plain = fastcam.attribute(model, images, "grad_cam", targets=2, normalize=False)
    torch.testing.assert_close(plain.maps, resized)


@pytest.mark.parametrize(
    ("size", "shape"), [("input", (12, 10)), ("layer", (6, 5)), ((7, 9), (7, 9)), ([2, 1], (2, 1))]
)
def test_sizes(model, images, size, shape):
    assert fastcam.attribute(model, images, size=size).maps.shape == (3, *shape)


@pytest.mark.parametrize("layer", ["layer1", "layer1.0", "layer2.1", "layer2"])
def test_layers_by_name_and_by_module(model, images, layer):
    by_name = fastcam.attribute(model, images, layer=layer)
    by_module = fastcam.attribute(model, images, layer=model.get_submodule(layer))
    assert torch.equal(by_name.maps, by_module.maps)
    assert by_name.layer == by_module.layer == layer


def test_several_targets_are_single_targets_side_by_side(model, images):
    for layer in ("layer1", "layer2"):
        several = fastcam.attribute(model, images, layer=layer, targets=[[0, 3], [1, 1], [4, 2]])
        assert several.maps.shape == (3, 2, 12, 10)
        for column, targets in enumerate(([0, 1, 4], [3, 1, 2])):
            one = fastcam.attribute(model, images, layer=layer, targets=targets)
            torch.testing.assert_close(several.maps[:, column], one.maps, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(several.weights[:, column], one.weights, rtol=1e-5, atol=1e-7)
    top = fastcam.attribute(model, images, targets="top2")
    assert torch.equal(top.targets, model(images).topk(2).indices)


@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_callable_targets(model, images, layer):
    def margin(output):
        return output[:, 1] - output[:, 3]

    pair = fastcam.attribute(model, images, layer=layer, targets=[[1, 3]] * 3, normalize=False)
    found = fastcam.attribute(model, images, layer=layer, targets=margin, normalize=False)
    torch.testing.assert_close(found.weights, pair.weights[:, 0] - pair.weights[:, 1], rtol=1e-4, atol=1e-7)
    assert found.targets is margin


def test_structured_outputs_take_a_callable(images):
    class Two(Small):
        def forward(self, x):
            return {"logits": super().forward(x), "extra": (x.mean(),)}

    torch.manual_seed(0)
    structured, plain = Two().eval(), Small().eval()
    plain.load_state_dict(structured.state_dict())
    found = fastcam.attribute(structured, images, targets=lambda out: out["logits"][:, 1])
    torch.testing.assert_close(found.maps, fastcam.attribute(plain, images, targets=1).maps)
    assert set(found.scores) == {"logits", "extra"}
    with pytest.raises(TypeError, match="targets=callable"):
        fastcam.attribute(structured, images)


@pytest.mark.parametrize("method", OF_ANY_NETWORK)
@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_hook_path_gives_the_same(images, method, layer):
    torch.manual_seed(0)
    captured, hooked = Small().eval(), Branching().eval()
    hooked.load_state_dict(captured.state_dict())
    with pytest.raises(CaptureError):
        capture(hooked, images)
    refusals = {"cam": (ValueError, "cam needs a head")}
    refusals |= dict.fromkeys(NEED_CAPTURE, (RuntimeError, f"'{method}' needs a captured network, but torch.export"))
    if method in refusals:
        with pytest.raises(refusals[method][0], match=refusals[method][1]):
            fastcam.attribute(hooked, images, method, layer=layer)
        return
    expected = fastcam.attribute(captured, images, method, layer=layer, targets=[[0, 3]] * 3)
    found = fastcam.attribute(hooked, images, method, layer=layer, targets=[[0, 3]] * 3)
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-4, atol=1e-5)
    automatic = fastcam.attribute(hooked, images, method, targets=1)
    assert automatic.layer in ("layer2", "layer2.2")


def test_modules_without_computation_take_the_hook_path(images):
    class WithIdentity(Small):
        def __init__(self):
            super().__init__()
            self.tap = nn.Identity()

        def forward(self, x):
            return self.fc(self.tap(self.layer2(self.layer1(x))).mean((2, 3)))

    torch.manual_seed(0)
    model = WithIdentity().eval()
    torch.testing.assert_close(
        fastcam.attribute(model, images, "grad_cam", layer="tap").maps,
        fastcam.attribute(model, images, "grad_cam", layer="layer2").maps,
    )


def test_wrapped_models_are_explained_as_what_they_wrap(model, images):
    expected = fastcam.attribute(model, images).maps
    assert torch.equal(fastcam.attribute(nn.DataParallel(model), images).maps, expected)
    assert torch.equal(fastcam.attribute(torch.compile(model), images).maps, expected)


@pytest.mark.parametrize("method", OF_ANY_NETWORK)
@pytest.mark.parametrize("targets", [None, [], "top2"])
def test_empty_batch(model, images, method, targets):
    result = fastcam.attribute(model, images[:0], method, targets=targets)
    several = (2,) if targets == "top2" else ()
    assert result.maps.shape == (0, *several, 12, 10)
    assert result.raw.shape == (0, *several, *((12, 10) if method in PIXELS else (6, 5)))
    assert result.scores.shape == (0, 5)
    assert result.valid.shape == (0,)
    assert result.targets.shape == (0, *several)


def test_batch_independence(model, images):
    together = fastcam.attribute(model, images, "layer_cam", layer="layer1", targets=[0, 1, 2]).maps
    for i in range(3):
        alone = fastcam.attribute(model, images[i : i + 1], "layer_cam", layer="layer1", targets=[i]).maps
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def snapshot(model: nn.Module) -> dict:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "versions": [p._version for p in model.parameters()],
        "flags": [m.training for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
    }


def assert_same(before: dict, after: dict) -> None:
    for key in before:
        for one, other in zip(_flat(before[key]), _flat(after[key]), strict=True):
            same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
            assert same, key


def _flat(value):
    if isinstance(value, dict):
        return [item for pair in value.items() for item in pair]
    return list(value) if isinstance(value, (list, tuple)) else [value]


class Boom(Exception):
    pass


def _score_fails(output):
    raise Boom


@pytest.mark.parametrize("kind", [Small, Branching])
@pytest.mark.parametrize("layer", ["layer1", "layer2"])
@pytest.mark.parametrize("outcome", ["success", "score fails", "bad target", "forward fails"])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_the_model_is_untouched(images, kind, layer, outcome, mode):
    torch.manual_seed(0)
    model = kind()
    model.layer1.eval()  # a mixture of flags
    for parameter in model.layer2.parameters():
        parameter.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    targets = {"success": [[0, 1]] * 3, "score fails": _score_fails, "bad target": 77, "forward fails": 0}[outcome]
    given = images.clone() if outcome != "forward fails" else torch.randn(3, 4, 12, 10)
    kept = given.clone()
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    before = snapshot(model)
    with warnings.catch_warnings(), context():
        warnings.simplefilter("ignore")
        inside = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if outcome == "success":
            fastcam.attribute(model, given, "grad_cam", layer=layer, targets=targets)
        else:
            error = {"score fails": Boom, "bad target": IndexError, "forward fails": ValueError}[outcome]
            with pytest.raises(error):
                fastcam.attribute(model, given, "grad_cam", layer=layer, targets=targets)
        assert inside == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert_same(before, snapshot(model))
    assert torch.equal(given, kept)


def test_results_do_not_depend_on_the_callers_grad_mode(model, images):
    expected = fastcam.attribute(model, images, layer="layer1").maps
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(fastcam.attribute(model, images.clone(), layer="layer1").maps, expected)


def test_explaining_inside_a_training_loop_does_not_disturb_it(images):
    def train(explain: bool) -> dict:
        torch.manual_seed(3)
        model = Small().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            loss = functional.cross_entropy(model(images), torch.tensor([0, 1, 2]))
            loss.backward()
            if explain:
                fastcam.attribute(model, images, "grad_cam", layer="layer1")
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(model.state_dict())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one, other in zip(train(False).values(), train(True).values(), strict=True):
            assert torch.equal(one, other)


def test_train_mode_is_explained_as_eval_mode_with_one_warning(model, images):
    expected = fastcam.attribute(model, images).maps
    model.train()
    with pytest.warns(UserWarning, match="Small is in train mode"):
        assert torch.equal(fastcam.attribute(model, images).maps, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fastcam.attribute(model, images).maps, expected)
    assert model.training
    assert model.layer1[1].num_batches_tracked == 0


def test_precision_and_channels_last(model, images):
    expected = fastcam.attribute(model, images, "grad_cam").maps
    for options, tolerance in (
        ({"precision": "fp64"}, 1e-5),
        ({"channels_last": True}, 1e-5),
        ({"precision": "bf16", "channels_last": True}, 0.1),
    ):
        explainer = fastcam.Explainer(model, "grad_cam", **options)
        result = explainer(images)
        torch.testing.assert_close(result.maps.float(), expected, rtol=0, atol=tolerance)
        with torch.no_grad():
            model.fc.weight.neg_()
        changed = explainer(images, result.targets).maps
        assert not torch.allclose(changed.float(), expected, atol=0.2)
        with torch.no_grad():
            model.fc.weight.neg_()
        assert torch.equal(explainer(images).maps, result.maps)
    assert model.fc.weight.dtype == torch.float32


@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_compiled_explainer_agrees(model, images, layer):
    expected = fastcam.attribute(model, images, "grad_cam", layer=layer).maps
    found = fastcam.Explainer(model, "grad_cam", layer=layer, compile=True)(images).maps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_hook_path_refuses_what_needs_a_capture(images):
    with pytest.raises(RuntimeError, match=r"precision='bf16' and channels_last=True needs? a captured network, but"):
        fastcam.Explainer(Branching().eval(), "grad_cam", precision="bf16", channels_last=True)(images)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m, x: fastcam.attribute("resnet", x), TypeError, "model must be a torch.nn.Module; got str"),
        (
            lambda m, x: fastcam.attribute(torch.jit.trace(m, x), x),
            TypeError,
            "TorchScript model cannot",
        ),
        (lambda m, x: fastcam.attribute(m, x.numpy()), TypeError, "images must be a torch.Tensor"),
        (lambda m, x: fastcam.attribute(m, (x * 9).to(torch.uint8)), TypeError, "floating point.*got torch.uint8"),
        (lambda m, x: fastcam.attribute(m, x[0, 0]), ValueError, "is the batch dimension missing"),
        (lambda m, x: fastcam.attribute(m, x[:, :, :0]), ValueError, "hold no pixels"),
        (lambda m, x: fastcam.attribute(m, x.to_sparse()), TypeError, r"dense.*sparse_coo one: pass images.to_dense"),
        (lambda m, x: fastcam.attribute(m, x[:, :1]), ValueError, "images have 1 channels and Small takes .* 3: pass"),
        (
            lambda m, x: fastcam.attribute(m, x.movedim(1, -1), "grad_cam"),
            ValueError,
            r"have 12 channels and Small takes images with 3: pass images.movedim\(-1, 1\)",
        ),
        (lambda m, x: fastcam.attribute(m, x.double()), TypeError, "float64 and the model's parameters are .*float32"),
        (lambda m, x: fastcam.attribute(m, x.to("meta")), ValueError, "images are on meta and the model is on cpu"),
        (lambda m, x: fastcam.attribute(m, x, "gradcam"), ValueError, "did you mean 'grad_cam'"),
        (lambda m, x: fastcam.attribute(m, x, layer="layer9"), ValueError, "no layer 'layer9'; close names: 'layer"),
        (lambda m, x: fastcam.attribute(m, x, layer=nn.ReLU()), ValueError, "not a module of this Small"),
        (lambda m, x: fastcam.attribute(m, x, layer=3), TypeError, "layer must be None, a dotted module name"),
        (lambda m, x: fastcam.attribute(m, x, layer="fc"), ValueError, r"'fc' has no spatial extent.*\(B, 5\)"),
        (lambda m, x: fastcam.attribute(m, x, "grad_cam", layer="drop"), ValueError, r"'drop' has no spatial extent"),
        (lambda m, x: fastcam.attribute(m, x, targets=5), IndexError, "target 5 is out of range"),
        (lambda m, x: fastcam.attribute(m, x, targets=np.int64(-1)), IndexError, "target -1 is out of range"),
        (lambda m, x: fastcam.attribute(m, x, targets=np.array([0.5] * 3)), TypeError, "integers, got torch.float64"),
        (lambda m, x: fastcam.attribute(m, x, targets=[]), ValueError, r"shape \(0,\) do not fit a batch of 3"),
        (lambda m, x: fastcam.attribute(m, x, targets=[0, 1]), ValueError, "do not fit a batch of 3"),
        (lambda m, x: fastcam.attribute(m, x, size="full"), ValueError, "size must be 'input', 'layer'"),
        (lambda m, x: fastcam.attribute(m, x, size=(0, 4)), ValueError, "size must be"),
        (lambda m, x: fastcam.attribute(m, x, size=np.array([4.0, 5])), ValueError, "size must be"),
        (lambda m, x: fastcam.attribute(m, x, size=(3, 3, 3)), ValueError, "2 spatial dimensions"),
        (lambda m, x: fastcam.attribute(m, x, rely=False), TypeError, "no option 'rely'; did you mean 'relu'.*options"),
        (lambda m, x: fastcam.attribute(m, x, on_nonfinite="x"), ValueError, "on_nonfinite must be"),
        (lambda m, x: fastcam.Explainer(m, "cam", precision="int8"), ValueError, "precision must be None or one of"),
        (lambda m, x: fastcam.attribute(m, x, "cam", layer="layer1"), ValueError, "cam needs a head"),
        (lambda m, x: fastcam.attribute(m, x, targets=lambda o: o), ValueError, r"shape \(3,\); it returned shape"),
        (lambda m, x: fastcam.attribute(m, x, layer="layer1", targets=lambda o: o), ValueError, r"shape \(3,\)"),
        (lambda m, x: fastcam.attribute(m, x, targets=lambda o: o[:, 0].detach()), RuntimeError, "'layer2'.*detach"),
    ],
)
def test_bad_input(model, images, call, error, says):
    with pytest.raises(error, match=says):
        call(model, images)


@pytest.mark.parametrize("network", [Small, Branching])
@pytest.mark.parametrize(("method", "layer"), [("lift_cam", None), ("grad_cam", None), ("grad_cam", "layer1")])
def test_an_image_that_is_no_batch_is_told(images, network, method, layer):
    """Whether (3, 16, 20) is a picture or three signals is the model's to say: it runs on one of the two."""
    model, one = network().eval(), images[0]
    with pytest.raises(ValueError, match=r"Small|Branching") as caught:
        fastcam.attribute(model, one, method, layer=layer)
    batch, single = (1, *one.shape), tuple(one.shape)
    assert f"{network.__name__} runs on shape {batch}, not on {single}; pass images.unsqueeze(0)" in str(caught.value)
    if network is Small or method != "lift_cam":
        assert fastcam.attribute(model, one.unsqueeze(0), method, layer=layer).maps.shape == (1, *one.shape[1:])


def test_a_volume_that_is_no_batch_is_told():
    net = nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"Sequential runs on shape \(1, 2, 6, 5, 4\), not on \(2, 6, 5, 4\)"):
        fastcam.attribute(net, torch.ones(2, 6, 5, 4))


@pytest.mark.parametrize("method", ["lift_cam", "grad_cam"])
def test_what_the_model_says_of_other_shapes_stays(method):
    """Sequences are no pictures without a batch, and other faults keep their own error."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = nn.Conv1d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self.fc(functional.relu(self.inner(x)).mean(-1))

    signals = torch.rand(2, 3, 9)
    if method == "lift_cam":
        with pytest.raises(CaptureError, match="needs a captured network, but torch"):
            fastcam.attribute(Sequences().eval(), signals, method)
    else:
        assert fastcam.attribute(Sequences().eval(), signals, method).maps.shape == (2, 9)
    error, says = (ValueError, "5 channels") if method == "grad_cam" else (RuntimeError, "cannot trace it")
    with pytest.raises(error, match=says):
        fastcam.attribute(Sequences().eval(), torch.rand(2, 5, 9), method)


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend"), fastcam.backend("cudaa"):
        pass


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_nonfinite_images(model, images, bad, layer):
    images[1, 0, 3, 3] = bad
    with pytest.raises(ValueError, match=rf"features of layer '{layer}' are not finite for image 1 \(1 of 3"):
        fastcam.attribute(model, images, layer=layer)
    masked = fastcam.attribute(model, images, layer=layer, on_nonfinite="mask")
    assert masked.valid.tolist() == [True, False, True]
    assert not masked.maps[1].any()
    clean = images.clone()
    clean[1] = 0
    torch.testing.assert_close(masked.maps[[0, 2]], fastcam.attribute(model, clean, layer=layer).maps[[0, 2]])


def test_nonfinite_weights_are_named(model, images):
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"model's output is not finite for image 0 .*the model's 'fc.bias' holds NaN"):
        fastcam.attribute(model, images, targets=1)


@pytest.mark.parametrize("name", ["layer1.0.weight", "layer2.1.bias"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("lift_cam", {"channels_last": True}), ("grad_cam", {"precision": "bf16", "layer": "layer1"}), ("lrp", {})],
)
def test_nonfinite_weights_are_seen_where_convolutions_end_in_relu(model, images, name, method, settings):
    """ReLU inside a packed convolution makes zeros of NaN."""
    explainer = fastcam.Explainer(model, method, on_nonfinite="mask", **settings)
    before = explainer(images)
    weight = model.get_parameter(name).data.view(-1)
    kept = weight[0].clone()
    weight[0] = float("nan")
    masked = explainer(images)
    assert not masked.valid.any()
    assert not masked.maps.any()
    with pytest.raises(ValueError, match=f"the model's '{name}' holds NaN or infinity"):
        fastcam.attribute(model, images, method, **{k: v for k, v in settings.items() if k == "layer"})
    weight[0] = kept
    again = explainer(images)
    assert again.valid.all()
    assert torch.equal(again.maps, before.maps)


def test_numpy_numbers_are_numbers(model, images):
    explainer = fastcam.Explainer(model, "grad_cam", size=np.array([4, 5]))
    assert explainer.size == (4, 5)
    expected = explainer(images, [1, 1, 1]).maps
    read_only = np.array([1, 1, 1], dtype=np.int32)
    read_only.flags.writeable = False
    for targets in (np.int64(1), read_only):
        assert torch.equal(explainer(images, targets).maps, expected)
    assert explainer(images, np.array([[0, 1]] * 3)).maps.shape == (3, 2, 4, 5)
    assert fastcam.attribute(model, images, size=(np.int64(4), np.int64(5))).maps.shape == (3, 4, 5)


def test_flat_maps_are_zero_not_nan(model, images):
    with torch.no_grad():
        model.fc.weight[0] = 0
    result = fastcam.attribute(model, images, targets=0)
    assert not result.maps.any()
    assert result.valid.all()


def test_a_slow_fallback_says_so_once(images, caplog):
    model = Branching().eval()
    with caplog.at_level(logging.INFO, logger="fastcam"):
        explainer = fastcam.Explainer(model, "grad_cam")
        explainer(images)
        explainer(images)
    lines = [record.message for record in caplog.records if "forward hook" in record.message]
    assert len(lines) == 1
    assert "Branching is explained through a forward hook: torch.export cannot trace it" in lines[0]


def test_importing_is_cheap():
    """No triton, no export machinery, no plotting, no CUDA context, nothing printed."""
    code = (
        "import sys, fastcam\n"
        "heavy = ('triton', 'sympy', 'torch._dynamo', 'matplotlib', 'PIL', 'sklearn')\n"
        "loaded = [name for name in heavy if name in sys.modules]\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_methods_lists_options_and_sources():
    listed = fastcam.methods()
    assert list(listed)[:2] == ["lift_cam", "a_fmi"]
    for row in listed.values():
        assert row["summary"]
        assert row["source"]
        assert {"reshape_transform", "on_nonfinite"} <= set(row["options"])
    assert listed["cam"]["options"]["relu"] is False
    assert len(OF_ANY_NETWORK) == len(listed) - 2  # sfam, lfi_cam


def test_replaced_layers_are_seen_even_at_a_reused_address(images):
    torch.manual_seed(0)
    model = Small().eval()
    for options in ({}, {"channels_last": True}):
        explainer = fastcam.Explainer(model, "grad_cam", **options)
        for _ in range(12):
            model.fc = nn.Linear(8, 5)
            torch.testing.assert_close(explainer(images, 0).scores, model(images).detach(), rtol=1e-4, atol=1e-5)


def test_concurrent_first_calls(images):
    torch.manual_seed(0)
    model = Small().eval()
    expected = copy.deepcopy(model.state_dict())
    failures = []

    def explain(extra):
        try:
            fastcam.attribute(model, torch.rand(2, 3, 8 + extra, 8), targets=0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=explain, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize("kind", ["function", "detach", "straight through"])
def test_gradients_that_differ_from_the_operators_are_kept(images, kind):
    class Odd(Small):
        def forward(self, x):
            x = self.layer1(x)
            if kind == "function":
                x = Reversed.apply(x)
            elif kind == "detach":
                x = x.detach()
            else:
                x = x + (x.round() - x).detach()
            return self.fc(self.layer2(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Odd().eval()
    if kind == "detach":
        with pytest.raises(RuntimeError, match="score does not depend on layer 'layer1'"):
            fastcam.attribute(model, images, "grad_cam", layer="layer1", targets=0)
        return
    found = fastcam.attribute(model, images, "grad_cam", layer="layer1", targets=0)
    kept = []
    handle = model.layer1.register_forward_hook(
        lambda m, a, out: kept.append(out.detach().requires_grad_()) or kept[0] * 1
    )
    score = model(images)[:, 0].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    torch.testing.assert_close(found.weights, gradient.mean((2, 3)))


def test_hook_path_puts_buffers_back(images):
    class Counts(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    torch.manual_seed(0)
    model = Counts().eval()
    fastcam.attribute(model, images, "grad_cam")
    assert model.calls == 0


def test_images_made_under_inference_mode(images):
    class Gate(Small):
        def forward(self, x):
            return self.fc((self.layer1(x) * x.mean(1, keepdim=True)).relu().mean((2, 3)).repeat(1, 2)[:, :8])

    torch.manual_seed(0)
    model = Gate().eval()
    expected = fastcam.attribute(model, images, layer="layer1", targets=0).maps
    with torch.inference_mode():
        assert torch.equal(fastcam.attribute(model, images.clone(), layer="layer1", targets=0).maps, expected)


def test_targets_made_under_inference_mode(images):
    """As those that somebody's prediction found."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()
    with torch.inference_mode():
        found = model(images).argmax(1)
    explainer = fastcam.Explainer(model, "grad_cam", layer="0")
    expected = explainer(images, found.tolist()).maps
    assert expected.amax() == 1
    assert torch.equal(explainer(images, found).maps, expected)


def test_explainers_can_be_pickled_and_copied(model, images):
    explainer = fastcam.Explainer(model, "grad_cam", channels_last=True)
    expected = explainer(images).maps
    assert torch.equal(pickle.loads(pickle.dumps(explainer))(images).maps, expected)
    assert torch.equal(copy.deepcopy(explainer)(images).maps, expected)


def test_empty_batches_are_checked_too(model, images):
    for wrong in (99, 10**30, -1):
        with pytest.raises(IndexError, match="out of range"):
            fastcam.attribute(model, images[:0], targets=wrong)


def test_explainers_of_two_precisions_share_a_model(model, images):
    """Taking turns, neither repacks its weights; and what one kept is gone when it is."""
    pack, packed = torch.ops.mkldnn._reorder_convolution_weight, []

    class Counting:
        def __call__(self, *args):
            packed.append(1)
            return pack(*args)

    half = fastcam.Explainer(model, "grad_cam", precision="bf16", channels_last=True)
    full = fastcam.Explainer(model, "grad_cam", channels_last=True)
    expected = [explainer(images).maps for explainer in (half, full)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", Counting())
        for _ in range(3):
            assert torch.equal(half(images).maps, expected[0])
            assert torch.equal(full(images).maps, expected[1])
    assert not packed
    weights = [
        weakref.ref(tensor) for kept in half._bindings._kept.values() for _, tensor in kept.weights._converted.values()
    ]
    del half
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_the_hook_path_from_several_threads(images):
    torch.manual_seed(0)
    model = Branching().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [fastcam.attribute(model, images + i, "grad_cam", layer="layer1", targets=0).maps for i in range(4)]
        wrong = []

        def explain(i):
            for _ in range(10):
                try:
                    found = fastcam.attribute(model, images + i, "grad_cam", layer="layer1", targets=0)
                    if not torch.equal(found.maps, expected[i]):
                        wrong.append(i)
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=explain, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert all(module.training for module in model.modules())
    assert not model.layer1._forward_hooks


def test_models_made_under_inference_mode_are_refused_with_a_cure(images):
    with torch.inference_mode():
        model = Small().eval()
    for layer in ("layer1", "layer2"):
        with pytest.raises(RuntimeError, match=r"made under torch.inference_mode.*copy.deepcopy\(model\)"):
            fastcam.attribute(model, images, layer=layer)
    assert fastcam.attribute(copy.deepcopy(model), images, layer="layer1").valid.all()


@pytest.mark.parametrize("method", ["grad_cam", "deep_lift", "lrp", "attribution_equilibrium"])
def test_autocast_around_a_call_changes_nothing(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Hardswish()),
        *(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = fastcam.attribute(model, images, method, targets=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = fastcam.attribute(model, images, method, targets=1)
        assert torch.is_autocast_enabled("cpu")
    assert found.maps.dtype == torch.float32
    torch.testing.assert_close(found.maps, expected.maps)
    torch.testing.assert_close(found.scores, expected.scores)


def test_tensors_written_into_slices_behind_the_layer(images):
    """What `copy` becomes has a derivative. Oracle: autograd through the module."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            features = self.conv(x)
            found = torch.zeros_like(features)
            found[:, :4] = features[:, :4].sigmoid() * 2
            found[:, 4:] = features[:, 4:].relu()
            return self.fc(found.mean((2, 3)).tanh())

    torch.manual_seed(0)
    model = Halves().eval().double()
    kept: list[torch.Tensor] = []
    with torch.enable_grad():
        hook = model.conv.register_forward_hook(lambda module, args, output: kept.append(output))
        score = model(images.double())[:, 2].sum()
        hook.remove()
        (gradient,) = torch.autograd.grad(score, kept[0])
    expected = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).detach()
    found = fastcam.attribute(
        model, images.double(), "grad_cam", layer="conv", targets=2, relu=False, normalize=False, size="layer"
    )
    torch.testing.assert_close(found.raw, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"precision": "bf16", "channels_last": True}])
def test_nan_made_inside_the_network_is_told(options):
    """A constant image, standardised by the network itself: a ReLU inside a convolution would make zeros of it."""

    class Standardised(Small):
        def forward(self, x):
            return super().forward((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))

    with pytest.raises(ValueError, match="not finite"):
        fastcam.attribute(Standardised().eval(), torch.ones(2, 3, 12, 10), "grad_cam", **options)
