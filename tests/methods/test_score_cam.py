"""Score-CAM, SS-CAM and IS-CAM against loops over images and channels, and what their definitions imply."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models
from fastcam.methods._method import Passage

METHODS = ["score_cam", "ss_cam", "is_cam"]
NETS = {"gap": models.gap_linear, "vgg": models.vgg_like, "residual": models.residual}
CLASSES = [4, 0, 2]
#: Fewer draws than by default, so that tests are quick.
FEW = {"score_cam": {}, "ss_cam": {"n": 3}, "is_cam": {"n": 3}}


def images(size=(11, 14), batch=3, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explain(net, x, method, targets=1, layer="features", **options):
    return fastcam.attribute(net, x, method, targets=targets, layer=layer, **{**FEW[method], **options})


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


def variants(method, size, n=3, noise_std=2.0, seed=0, schedule="torchcam"):
    """The masks a mask H is made into, as functions."""
    if method == "score_cam":
        return [lambda mask: mask]
    if method == "ss_cam":
        generator = torch.Generator().manual_seed(seed)
        noise = noise_std * torch.randn((n, *size), generator=generator, dtype=torch.float64)
        return [lambda mask, e=e: mask + e for e in noise]
    steps = range(1, n + 1)
    scales = [sum(range(1, i + 1)) / n if schedule == "torchcam" else i / n for i in steps]
    return [lambda mask, c=c: c * mask for c in scales]


def scores(oracle, net, layer, x, score, method="score_cam", order="resize_then_minmax", **options):
    """(A, (B, K) mean scores), one forward pass on one image at a time."""
    a = oracle.tap(net, layer, x, lambda output: torch.utils._pytree.tree_leaves(output)[0])[0]
    size, found = x.shape[2:], torch.zeros(a.shape[:2], dtype=a.dtype)
    for b, maps in enumerate(a):
        for k, one in enumerate(maps):
            if order == "resize_then_minmax":
                mask = oracle.min_max(oracle.resized(one[None], size))[0]
            else:
                mask = oracle.resized(oracle.min_max(one[None]), size)[0]
            if one.max() == one.min():
                mask = torch.zeros(size, dtype=a.dtype)
            made = variants(method, size, **options)
            with torch.no_grad():
                found[b, k] = sum(score(net((x[b] * change(mask))[None]), b)[0] for change in made) / len(made)
    return a, found


def by_class(classes):
    return lambda output, b: output[:, classes[b]]


def check(oracle, net, layer, x, method, chunk=32, **options):
    a, s = scores(oracle, net, layer, x, by_class(CLASSES), method, **options)
    got = explain(net, x, method, CLASSES[: len(x)], layer, chunk=chunk, **options)
    close(got.weights, s.softmax(1))
    raw = (s.softmax(1).reshape(*s.shape, *(1,) * (a.ndim - 2)) * a).sum(1).clamp(min=0)
    close(got.raw, raw)
    torch.testing.assert_close(got.maps, oracle.min_max(oracle.resized(raw, x.shape[2:])), rtol=0, atol=1e-10)
    plain = explain(net, x, method, CLASSES[: len(x)], layer, weight_norm="none", chunk=chunk, **options)
    close(plain.weights, s)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_written_formula(oracle, method, name):
    check(oracle, NETS[name]().double(), "features", images(), method)


@pytest.mark.parametrize("layer", ["features.0.conv", "features.1.conv"])
@pytest.mark.parametrize("order", ["resize_then_minmax", "minmax_then_resize"])
@pytest.mark.parametrize("method", METHODS)
def test_written_formula_at_other_layers_in_both_orders(oracle, method, order, layer):
    check(oracle, models.vgg_like().double(), layer, images(batch=2), method, order=order)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ss_cam", {"n": 2, "noise_std": 0.5, "seed": 7}),
        ("is_cam", {"n": 4, "schedule": "linear"}),
        ("is_cam", {"n": 1}),
    ],
)
def test_options_of_the_average(oracle, method, options):
    check(oracle, models.vgg_like().double(), "features", images(batch=2), method, **options)


@pytest.mark.parametrize(("rank", "size"), [(1, (19,)), (3, (8, 9, 10))])
@pytest.mark.parametrize("order", ["resize_then_minmax", "minmax_then_resize"])
@pytest.mark.parametrize("method", METHODS)
def test_one_and_three_dimensions(oracle, method, order, rank, size):
    check(oracle, models.vgg_like(rank=rank).double(), "features", images(size, 2), method, order=order)


def test_three_dimensions_with_a_flat_map_in_chunks(oracle):
    net = models.gap_linear(rank=3).double()
    with torch.no_grad():
        net.features[1].conv.weight[2] = 0
        net.features[1].conv.bias[2] = 1
    check(oracle, net, "features", images((8, 9, 10), 2), "ss_cam", chunk=4)


# --- 8: weights, constants, chunks ---


@pytest.mark.parametrize("method", METHODS)
def test_weights_sum_to_one_and_a_constant_changes_nothing(method):
    net, x = models.vgg_like().double(), images()
    found = explain(net, x, method, CLASSES)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-14)
    shifted = copy.deepcopy(net)
    with torch.no_grad():
        shifted.head[-1].bias += 3
    torch.testing.assert_close(explain(shifted, x, method, CLASSES).weights, found.weights, rtol=0, atol=1e-12)
    index, baseline = torch.tensor(CLASSES), net(x).detach()

    def difference(output):
        return (output - baseline)[torch.arange(3), index]

    torch.testing.assert_close(explain(net, x, method, difference).weights, found.weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 8, 11, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_the_chunk_changes_nothing_and_bounds_the_rows(monkeypatch, method, chunk):
    net, x, rows = models.vgg_like().double(), images(), []
    want = explain(net, x, method, CLASSES).weights
    original = Passage.output_of

    def counting(self, images, folded=False):
        rows.append(len(images))
        return original(self, images, folded)

    monkeypatch.setattr(Passage, "output_of", counting)
    torch.testing.assert_close(explain(net, x, method, CLASSES, chunk=chunk).weights, want, rtol=0, atol=1e-12)
    assert max(rows) <= chunk
    assert sum(rows) == 3 * 8 * (1 if method == "score_cam" else 3)


@pytest.mark.parametrize("layer", ["features", "features.0"])
@pytest.mark.parametrize("method", METHODS)
def test_batch_is_a_loop(method, layer):
    net, x = models.vgg_like().double(), images()
    together = explain(net, x, method, CLASSES, layer)
    for b in range(3):
        alone = explain(net, x[b : b + 1], method, CLASSES[b : b + 1], layer)
        torch.testing.assert_close(together.weights[b], alone.weights[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together.maps[b], alone.maps[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_several_targets_and_callables(method):
    net, x = models.residual().double(), images()
    found = explain(net, x, method, [[4, 1], [0, 3], [2, 2]])
    assert found.maps.shape == (3, 2, 11, 14)
    for column, classes in enumerate(([4, 0, 2], [1, 3, 2])):
        one = explain(net, x, method, classes)
        close(found.weights[:, column], one.weights)
        index = torch.tensor(classes)
        called = explain(net, x, method, lambda output, index=index: output.gather(1, index[:, None])[:, 0])
        close(called.weights, one.weights)
        close(called.raw, one.raw)


def test_probability_target_without_softmax_over_channels(oracle):
    net, x = models.vgg_like().double(), images()
    _, s = scores(oracle, net, "features", x, lambda output, b: output.softmax(1)[:, 1])
    close(explain(net, x, "score_cam", lambda output: output.softmax(1)[:, 1], weight_norm="none").weights, s)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_structured_outputs(oracle, kind):
    net, x, part = models.structured(kind).double(), images(), "logits" if kind == "dict" else 0
    _, s = scores(oracle, net, "features", x, lambda output, b: output[part][:, 1])
    close(explain(net, x, "score_cam", lambda output: output[part][:, 1], chunk=7).weights, s.softmax(1))


def test_a_part_of_the_output_without_rows_is_handed_on():
    class WithMean(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models.vgg_like()

        def forward(self, x):
            return {"logits": self.net(x), "mean": x.mean()}

    net, x = WithMean().double().eval(), images()
    got = explain(net, x, "score_cam", lambda output: output["logits"][:, 1] + 0 * output["mean"], "net.features")
    close(got.weights, explain(net.net, x, "score_cam").weights)


@pytest.mark.parametrize("method", METHODS)
def test_channel_order_does_not_matter(method):
    """Also of SS-CAM: all maps see the same noise."""
    net, x = models.gap_linear().double(), images()
    shuffled, order = copy.deepcopy(net), torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for tensor in (shuffled.features[1].conv.weight, shuffled.features[1].conv.bias):
            tensor.copy_(tensor[order])
        shuffled.head[2].weight.copy_(shuffled.head[2].weight[:, order])
    got, want = explain(shuffled, x, method, CLASSES), explain(net, x, method, CLASSES)
    close(got.weights, want.weights[:, order])
    close(got.raw, want.raw)


def test_no_noise_and_scale_one_are_score_cam():
    net, x = models.vgg_like().double(), images()
    want = explain(net, x, "score_cam").weights
    close(explain(net, x, "ss_cam", noise_std=0.0, n=4).weights, want)
    close(explain(net, x, "is_cam", n=1).weights, want)
    assert not torch.allclose(explain(net, x, "ss_cam").weights, want)
    assert not torch.allclose(explain(net, x, "ss_cam", seed=1).weights, explain(net, x, "ss_cam").weights)
    assert torch.equal(explain(net, x, "ss_cam", seed=1).weights, explain(net, x, "ss_cam", seed=1).weights)


# --- flat maps and images ---


@pytest.mark.parametrize("chunk", [1, 4, 32])
@pytest.mark.parametrize("method", METHODS)
def test_flat_maps_share_a_pass(oracle, monkeypatch, method, chunk):
    net, x, rows = models.vgg_like().double(), images(), []
    with torch.no_grad():
        for channel, bias in ((1, -1.0), (4, 0.3), (6, -1.0)):
            net.features[1].conv.weight[channel] = 0
            net.features[1].conv.bias[channel] = bias
    original = Passage.output_of
    monkeypatch.setattr(Passage, "output_of", lambda p, x, folded=False: rows.append(len(x)) or original(p, x, folded))
    check(oracle, net, "features", x, method, chunk=chunk)
    rows.clear()
    found = explain(net, x, method, [[0, 1]] * 3, chunk=chunk).weights
    assert torch.equal(found[..., 1], found[..., 4])
    assert torch.equal(found[..., 1], found[..., 6])
    assert sum(rows) == 3 * (5 + 1) * (1 if method == "score_cam" else 3)


def test_a_zero_image_takes_one_pass(monkeypatch):
    net, x, rows = models.vgg_like().double(), images(), []
    x[1] = 0
    want = explain(net, x[[0, 2]], "ss_cam", [4, 2]).weights
    original = Passage.output_of
    monkeypatch.setattr(Passage, "output_of", lambda p, x, folded=False: rows.append(len(x)) or original(p, x, folded))
    found = explain(net, x, "ss_cam", CLASSES).weights
    close(found[[0, 2]], want)
    close(found[1], torch.full((8,), 1 / 8, dtype=torch.float64))
    assert sum(rows) == 3 * (8 + 1 + 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [None, [], "top2"])
def test_empty_batch(method, targets):
    found = fastcam.attribute(models.vgg_like(), images()[:0].float(), method, targets=targets, layer="features")
    assert found.maps.shape == (0, *((2,) if targets == "top2" else ()), 11, 14)


# --- other ways through the network ---


@pytest.mark.parametrize("method", METHODS)
def test_hook_path(method):
    net, x, rows = models.residual().double(), images(), []
    want = explain(net, x, method, CLASSES)
    net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    got = explain(net, x, method, CLASSES, chunk=5)
    close(got.weights, want.weights)
    close(got.maps, want.maps)
    assert max(rows[1:]) <= 5


@pytest.mark.parametrize("method", METHODS)
def test_tokens(oracle, method):
    net, x = models.tokens().double(), images((8, 12), 2)

    def grid(found):
        return found[:, 1:].reshape(len(found), 2, 3, 12).permute(0, 3, 1, 2)

    class Spatial(nn.Module):
        """The same network whose layer `features` gives a feature map."""

        def __init__(self):
            super().__init__()
            self.net, self.features = net, nn.Identity()

        def forward(self, x):
            patches = self.net.patches(x).flatten(2).mT
            found = self.net.features(torch.cat([self.net.cls.expand(len(x), -1, -1), patches], dim=1))
            spatial = self.features(grid(found)).flatten(2).mT
            return self.net.fc(self.net.mix(torch.cat([found[:, :1], spatial], 1))[:, 0])

    a, s = scores(oracle, Spatial(), "features", x, by_class(CLASSES), method)
    got = explain(net, x, method, CLASSES[:2], reshape_transform=grid)
    close(got.weights, s.softmax(1), 1e-11)
    close(got.raw, torch.einsum("bk,bkhw->bhw", s.softmax(1), a).clamp(min=0), 1e-11)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"precision": "fp64"}, {"channels_last": True}])
@pytest.mark.parametrize("method", METHODS)
def test_precision_and_layout(method, settings):
    net, x = models.residual(), images(dtype=torch.float32)
    options = {"layer": "features", "weight_norm": "none", **FEW[method]}
    want = fastcam.Explainer(models.residual().double(), method, **options)(x.double(), CLASSES).weights
    got = fastcam.Explainer(net, method, **settings, **options)(x, CLASSES)
    assert got.weights.dtype == (torch.float64 if settings == {"precision": "fp64"} else torch.float32)
    tolerance = {"bf16": 3e-2, "fp64": 1e-6}.get(settings.get("precision"), 1e-5)
    torch.testing.assert_close(got.weights.double(), want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_models(method):
    net, x = models.residual(), images(dtype=torch.bfloat16)
    want = explain(copy.deepcopy(net).double(), x.double(), method, CLASSES, weight_norm="none").weights
    got = explain(net.bfloat16(), x, method, CLASSES, weight_norm="none")
    assert got.weights.dtype == torch.float32
    assert float((got.weights - want).abs().max()) <= 3e-2 * float(want.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_not_finite(method):
    x = images(dtype=torch.float32)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite for image 1"):
        explain(models.vgg_like(), x, method)
    found = explain(models.vgg_like(), x, method, on_nonfinite="mask")
    assert found.valid.tolist() == [True, False, True]
    assert not found.maps[1].any()
    want = explain(models.vgg_like(), images(dtype=torch.float32), method)
    torch.testing.assert_close(found.weights[[0, 2]], want.weights[[0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_recorded_or_left_behind(method):
    net, x = models.vgg_like(), images(dtype=torch.float32)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        found = explain(net, x, method)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not found.weights.requires_grad
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(found.maps, explain(net, x, method).maps)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("score_cam", {"chunk": 0}, ValueError, "chunk must be at least 1; got 0"),
        ("score_cam", {"chunk": 2.0}, TypeError, r"chunk must be an integer; got 2\.0"),
        ("score_cam", {"weight_norm": "sum"}, ValueError, "weight_norm must be one of 'softmax', 'none'; got 'sum'"),
        ("score_cam", {"order": "minmax"}, ValueError, "order must be one of 'resize_then_minmax', 'minmax_then_re"),
        ("score_cam", {"n": 3}, TypeError, "has no option 'n'"),
        ("ss_cam", {"n": 0}, ValueError, "n must be at least 1; got 0"),
        ("ss_cam", {"n": True}, TypeError, "n must be an integer; got True"),
        ("ss_cam", {"noise_std": -1.0}, ValueError, r"noise_std must be a finite number of at least 0; got -1\.0"),
        ("ss_cam", {"noise_std": float("nan")}, ValueError, "noise_std must be a finite number"),
        ("ss_cam", {"noise_std": "2"}, ValueError, "noise_std must be a finite number of at least 0; got '2'"),
        ("ss_cam", {"seed": 1.5}, TypeError, r"seed must be an integer; got 1\.5"),
        ("is_cam", {"n": -1}, ValueError, "n must be at least 1; got -1"),
        ("is_cam", {"schedule": "cubic"}, ValueError, "schedule must be one of 'torchcam', 'linear'; got 'cubic'"),
    ],
)
def test_wrong_options(method, options, error, message):
    with pytest.raises(error, match=message):
        fastcam.Explainer(models.gap_linear(), method, **options)
