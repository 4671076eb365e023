"""Ablation-CAM against whole passes with one channel replaced at a time, its closed form and its options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models
from fastcam.methods._method import Passage
from fastcam.program import session

NETS = {"gap": models.gap_linear, "vgg": models.vgg_like, "residual": models.residual}
CLASSES = [4, 0, 2]


def images(size=(11, 14), batch=3, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explain(net, x, targets=1, layer="features", **options):
    return fastcam.attribute(net, x, "ablation_cam", targets=targets, layer=layer, **options)


def close(got, want, tolerance=1e-12, scale=None):
    scale = float(want.detach().abs().max()) if scale is None else float(torch.as_tensor(scale).detach())
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale)


def by_class(classes):
    return lambda output, b: output[:, classes[b]]


def losses(net, layer, x, score, fill=0.0):
    """(A, (B, K) y - y_k, (B,) y): the whole network, one image and channel at a time, by hooks."""
    module, features, found, clean = net.get_submodule(layer), [], [], []
    for b, one in enumerate(x.unsqueeze(1)):
        handle = module.register_forward_hook(lambda module, args, result: features.append(result.detach().clone()))
        with torch.no_grad():
            clean.append(score(net(one), b)[0])
        handle.remove()
        row = []
        for k in range(features[-1].shape[1]):

            def edit(module, args, result, k=k):
                result = result.clone()
                result[:, k] = result[:, k].mean() if fill == "mean" else fill
                return result

            handle = module.register_forward_hook(edit)
            with torch.no_grad():
                row.append(clean[-1] - score(net(one), b)[0])
            handle.remove()
        found.append(torch.stack(row))
    return torch.cat(features), torch.stack(found), torch.stack(clean)


def check(oracle, net, layer, x, tolerance=1e-12, **options):
    classes = CLASSES[: len(x)]
    a, want, y = losses(net, layer, x, by_class(classes), options.get("fill", 0.0))
    got = explain(net, x, classes, layer, **options)
    close(got.weights, want, tolerance, y.abs().max())
    raw = (want.reshape(*want.shape, *(1,) * (a.ndim - 2)) * a).sum(1).clamp(min=0)
    assert raw.any()
    close(got.raw, raw, 10 * tolerance)
    torch.testing.assert_close(got.maps, oracle.min_max(oracle.resized(raw, x.shape[2:])), rtol=0, atol=1e-9)
    return got


@pytest.mark.parametrize("fill", [0.0, 0.7, -2, "mean"])
@pytest.mark.parametrize("name", NETS)
def test_written_formula(oracle, name, fill):
    if name == "gap" and fill == "mean":
        pytest.skip("no channel matters there: test_mean_changes_no_average")
    check(oracle, NETS[name]().double(), "features", images(), fill=fill)


@pytest.mark.parametrize("fill", [0.0, "mean"])
@pytest.mark.parametrize("layer", ["features.0.conv", "features.0", "features.1.conv"])
def test_written_formula_at_other_layers(oracle, layer, fill):
    check(oracle, models.vgg_like().double(), layer, images(), fill=fill)


@pytest.mark.parametrize("build", [models.gap_linear, models.vgg_like])
@pytest.mark.parametrize(("rank", "size"), [(1, (19,)), (3, (8, 9, 10))])
def test_one_and_three_dimensions(oracle, build, rank, size):
    check(oracle, build(rank=rank).double(), "features", images(size, 2), fill=0.3)


# --- 1: the closed form ---


def flat_linear() -> nn.Module:
    """An affine head whose gradient differs from position to position."""
    head = (nn.Flatten(), nn.Linear(6 * 6 * 7, 5))
    return models.seeded(lambda: models.Net(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh()), *head)).double()


@pytest.mark.parametrize("fill", [0.0, 0.7, "mean"])
@pytest.mark.parametrize("name", ["gap", "flat"])
def test_closed_form_is_the_runs_of_the_head(monkeypatch, name, fill):
    net, x = (models.gap_linear().double(), images()) if name == "gap" else (flat_linear(), images((8, 9)))
    index, edits = torch.tensor(CLASSES), []
    original = Passage.output_with
    monkeypatch.setattr(Passage, "output_with", lambda p, f, r: edits.append(len(f)) or original(p, f, r))
    closed = explain(net, x, CLASSES, fill=fill)
    assert not edits
    # A callable may be anything but linear, so the head runs.
    runs = explain(net, x, lambda output: output.gather(1, index[:, None])[:, 0], fill=fill)
    assert sum(edits) == 3 * 6
    close(closed.weights, runs.weights, 1e-12, net(x).abs().max())
    if name == "gap" and fill == 0:  # alpha = w mean(A)
        a = net.features(x).detach()
        close(closed.weights, (net.head[2].weight[index] * a.mean((2, 3))).detach())


def test_callables_that_are_not_linear_run_the_head():
    net, x = models.gap_linear().double(), images()
    _, want, _ = losses(net, "features", x, lambda output, b: output.softmax(1)[:, 1])
    close(explain(net, x, lambda output: output.softmax(1)[:, 1]).weights, want)


def test_mean_changes_no_average():
    found = explain(models.gap_linear().double(), images(), CLASSES, fill="mean")
    assert not found.weights.any()
    assert not found.maps.any()
    several = explain(models.gap_linear(rank=1).double(), images((19,)), "top2", fill="mean")
    assert several.weights.shape == (3, 2, 6)
    assert not several.weights.any()


def test_no_graph_is_recorded(monkeypatch):
    net, x = models.vgg_like().double(), images()
    want = explain(net, x).weights
    monkeypatch.setattr(session, "Graph", None)  # a call would fail
    assert torch.equal(explain(net, x).weights, want)


# --- 8: channels that change nothing; chunks; ways through the network ---


def dead(net: nn.Module, last: nn.Module) -> nn.Module:
    with torch.no_grad():
        for channel, bias in ((1, -1.0), (4, 0.5)):
            last.weight[channel] = 0
            last.bias[channel] = bias
    return net


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [models.gap_linear, models.vgg_like])
def test_a_map_that_is_its_replacement_has_weight_zero(monkeypatch, build, dtype):
    net, x, edits = build(), images(dtype=dtype), []
    net = dead(net, net.features[1].conv).to(dtype)
    original = Passage.output_with
    monkeypatch.setattr(Passage, "output_with", lambda p, f, r: edits.append(len(f)) or original(p, f, r))
    channels = net.features[1].conv.out_channels
    for fill, zero in ((0.0, [1]), (0.5, [4]), ("mean", [1, 4])):
        for targets in (1, "top2", lambda output: output[:, 1]):
            edits.clear()
            weights = explain(net, x, targets, fill=fill, chunk=7).weights
            rest = [k for k in range(channels) if k not in zero]
            assert not weights[..., zero].any()
            assert weights[..., rest].any() or (fill == "mean" and build is models.gap_linear)
            assert all(rows <= 7 for rows in edits)
            if edits:  # one run for all of an image's unchanged maps
                assert sum(edits) == 3 * (len(rest) + 1)


@pytest.mark.parametrize("chunk", [1, 5, 8, 1000])
def test_the_chunk_changes_nothing_and_bounds_the_rows(monkeypatch, chunk):
    net, x, edits = models.vgg_like().double(), images(), []
    want = explain(net, x, CLASSES).weights
    original = Passage.output_with
    monkeypatch.setattr(Passage, "output_with", lambda p, f, r: edits.append(len(f)) or original(p, f, r))
    close(explain(net, x, CLASSES, chunk=chunk).weights, want)
    assert sum(edits) == 3 * 8
    assert max(edits) <= chunk


@pytest.mark.parametrize("fill", [0.0, 0.4, "mean"])
def test_hook_path(fill):
    net, x, rows = models.residual().double(), images(), []
    want = explain(net, x, CLASSES, fill=fill)
    net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    got = explain(net, x, CLASSES, fill=fill, chunk=5)
    close(got.weights, want.weights)
    close(got.maps, want.maps, 1e-10)
    assert max(rows) <= 5
    gap, x = models.gap_linear().double(), images()
    want = explain(gap, x, "top2")
    gap.head[0].register_forward_hook(lambda module, args, result: None)
    close(explain(gap, x, "top2").weights, want.weights)


def test_tokens():
    net, x = models.tokens().double(), images((8, 12), 2)

    def grid(found):
        return found[:, 1:].reshape(len(found), 2, 3, 12).permute(0, 3, 1, 2)

    class Spatial(nn.Module):
        """The same network whose layer `spatial` gives a feature map."""

        def __init__(self):
            super().__init__()
            self.net, self.spatial = net, nn.Identity()

        def forward(self, x):
            patches = self.net.patches(x).flatten(2).mT
            found = self.net.features(torch.cat([self.net.cls.expand(len(x), -1, -1), patches], dim=1))
            spatial = self.spatial(grid(found)).flatten(2).mT
            return self.net.fc(self.net.mix(torch.cat([found[:, :1], spatial], 1))[:, 0])

    for fill in (0.0, "mean"):
        a, want, y = losses(Spatial(), "spatial", x, by_class(CLASSES), fill)
        got = explain(net, x, CLASSES[:2], reshape_transform=grid, fill=fill)
        close(got.weights, want, 1e-12, y.abs().max())
        close(got.raw, torch.einsum("bk,bkhw->bhw", want, a).clamp(min=0), 1e-11)


@pytest.mark.parametrize("layer", ["features", "features.0"])
@pytest.mark.parametrize("name", NETS)
def test_batch_is_a_loop_and_several_targets_are_one_by_one(name, layer):
    net, x = NETS[name]().double(), images()
    layer = "features" if name == "residual" else layer
    several = explain(net, x, [[4, 1], [0, 3], [2, 2]], layer)
    assert several.maps.shape == (3, 2, 11, 14)
    for column, classes in enumerate(([4, 0, 2], [1, 3, 2])):
        one = explain(net, x, classes, layer)
        close(several.weights[:, column], one.weights)
        index = torch.tensor(classes)
        called = explain(net, x, lambda output, index=index: output.gather(1, index[:, None])[:, 0], layer)
        close(called.weights, one.weights, 1e-11)
        for b in range(3):
            close(explain(net, x[b : b + 1], [classes[b]], layer).weights[0], one.weights[b], 1e-11)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_structured_outputs(kind):
    net, x, part = models.structured(kind).double(), images(), "logits" if kind == "dict" else 0
    _, want, _ = losses(net, "features", x, lambda output, b: output[part][:, 1])
    close(explain(net, x, lambda output: output[part][:, 1], chunk=4).weights, want)


@pytest.mark.parametrize("targets", [None, [], "top2"])
@pytest.mark.parametrize("name", NETS)
def test_empty_batch(name, targets):
    found = explain(NETS[name](), images()[:0].float(), targets)
    assert found.maps.shape == (0, *((2,) if targets == "top2" else ()), 11, 14)


# --- 5, 6: division, scale, constants ---


@pytest.mark.parametrize("name", NETS)
def test_division_by_the_magnitude_of_the_score(name):
    net, x = NETS[name]().double(), images()
    y = net(x).detach()
    assert (y < 0).any()
    for classes in (y.argmin(1), y.argmax(1), torch.stack([y.argmin(1), y.argmax(1)], 1)):
        plain, divided = explain(net, x, classes), explain(net, x, classes, divide=True)
        score = y.gather(1, classes.reshape(3, -1)).reshape(classes.shape)
        close(divided.weights, plain.weights / score.abs().unsqueeze(-1))
        torch.testing.assert_close(divided.maps, plain.maps, rtol=0, atol=1e-10)


def test_a_score_of_zero_is_not_divided_by():
    net, x = models.vgg_like().double(), images()
    found = explain(net, x, lambda output: output[:, 1] - output[0, 1], divide=True).weights
    same = explain(net, x, lambda output: output[:, 1] - output[0, 1]).weights
    assert found.isfinite().all()
    close(found[0], same[0])


@pytest.mark.parametrize("name", NETS)
def test_scale_and_constants(name):
    net, x = NETS[name]().double(), images()
    found, scaled, shifted = explain(net, x, CLASSES), copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        for parameter in scaled.head[-1].parameters():
            parameter *= 3
        shifted.head[-1].bias += 2
    close(explain(scaled, x, CLASSES).weights, 3 * found.weights)
    torch.testing.assert_close(explain(scaled, x, CLASSES).maps, found.maps, rtol=0, atol=1e-10)
    close(explain(shifted, x, CLASSES).weights, found.weights, 1e-11)


@pytest.mark.parametrize("fill", [0.0, "mean"])
@pytest.mark.parametrize("name", NETS)
def test_half_precision_models(name, fill):
    """Scores of bfloat16 networks are rounded to 2^-9: so are the losses, times the score."""
    if name == "gap" and fill == "mean":
        return
    net, x = NETS[name](), images(dtype=torch.bfloat16)
    want = explain(copy.deepcopy(net).double(), x.double(), CLASSES, fill=fill).weights
    got = explain(net.bfloat16(), x, CLASSES, fill=fill)
    assert got.weights.dtype == torch.float32
    scale = float(net(x).abs().max())
    assert float((got.weights - want).abs().max()) <= 2e-2 * scale


def test_not_finite():
    x = images(dtype=torch.float32)
    x[1, 0, 0, 0] = torch.nan
    for build in (models.gap_linear, models.vgg_like):
        with pytest.raises(ValueError, match="not finite for image 1"):
            explain(build(), x)
        found = explain(build(), x, on_nonfinite="mask")
        assert found.valid.tolist() == [True, False, True]
        assert not found.maps[1].any()
        want = explain(build(), images(dtype=torch.float32)).weights[[0, 2]]
        torch.testing.assert_close(found.weights[[0, 2]], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fill": "zero"}, ValueError, "fill must be a finite number or 'mean'; got 'zero'"),
        ({"fill": float("inf")}, ValueError, "fill must be a finite number or 'mean'; got inf"),
        ({"fill": None}, ValueError, "fill must be a finite number or 'mean'; got None"),
        ({"fill": True}, ValueError, "fill must be a finite number or 'mean'; got True"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1; got 0"),
        ({"chunk": "8"}, TypeError, "chunk must be an integer; got '8'"),
        ({"divide": 2}, TypeError, "divide must be True or False; got 2"),
        ({"ratio": 1.0}, TypeError, "has no option 'ratio'"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        fastcam.Explainer(models.gap_linear(), "ablation_cam", **options)
