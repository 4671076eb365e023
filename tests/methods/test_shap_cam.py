"""SHAP-CAM against its definition: the mean over all orders of the maps, taken here on a head that runs on its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import fastcam
from fastcam._testing import models
from fastcam._testing.models import Net
from fastcam._testing.shap_games import by_coalitions, by_orders, draw, explain, game_of, mlp, pick
from fastcam.methods import shap_cam as method
from fastcam.methods._perturb import edited_scores

#: float64; sums of up to 720 orders of scores of order 1 and their products with a few hundred weights
TIGHT = {"rtol": 0, "atol": 1e-10}
CLOSE = {"rtol": 0, "atol": 1e-12}


# --- exact ---


@pytest.mark.parametrize("maps", [1, 2, 3, 6])
def test_exact_is_the_mean_over_all_orders(maps):
    net, images = mlp(maps), draw(3, maps)
    got = explain(net, images)
    want = by_orders(net, images, torch.zeros_like(images), pick(1))
    torch.testing.assert_close(got.weights, want, **TIGHT)
    assert got.delta.abs().max() < 1e-12
    assert got.extra["estimator"] == "exact"
    assert got.extra["standard_error"].shape == (3, maps)
    assert not got.extra["standard_error"].any()
    assert got.weights.abs().min() > 1e-4  # the comparison is not of zeros
    torch.testing.assert_close(got.raw, (got.weights[..., None, None] * images).sum(1).relu(), **TIGHT)


@pytest.mark.parametrize("shape", [(), (5, 1, 1), (5, 4, 4), (1, 5, 4, 4), (3, 5, 4, 4)], ids=str)
def test_references(shape):
    net, images = mlp(5), draw(3, 5)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    got = explain(net, images, reference=base if shape else float(base), exact=True)
    torch.testing.assert_close(got.weights, by_orders(net, images, base, pick(1)), **TIGHT)
    assert got.delta.abs().max() < 1e-12


def test_several_targets_and_callables():
    net, images = mlp(4), draw(3, 4)
    got = explain(net, images, [[0, 2]] * 3)
    assert got.weights.shape == got.extra["standard_error"].shape == (3, 2, 4)
    assert got.delta.shape == (3, 2)
    for column, chosen in enumerate((0, 2)):
        want = by_orders(net, images, torch.zeros_like(images), pick(chosen))
        torch.testing.assert_close(got.weights[:, column], want, **TIGHT)

    def score(output):
        return output.softmax(1)[:, 2]  # not linear in the output

    for exact in (True, False):
        found = explain(net, images, score, exact=exact, n_orders=400)
        want = by_orders(net, images, torch.zeros_like(images), score)
        torch.testing.assert_close(found.weights, want, rtol=0, atol=1e-10 if exact else 0.01)


def test_callables_are_not_taken_for_linear():
    """The head is affine and the score is not: no closed form."""
    net, images = models.gap_linear().double(), draw(2, 3, 8)
    got = explain(net, images, lambda y: y.softmax(1)[:, 1])
    assert got.extra["estimator"] == "exact"
    assert got.delta.abs().max() < 1e-12
    features = net.features(images).detach()
    want = by_orders(net, features, torch.zeros_like(features), lambda y: y.softmax(1)[:, 1])
    torch.testing.assert_close(got.weights, want, **TIGHT)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_any_number_of_spatial_dimensions(rank):
    net = models.vgg_like(rank=rank).double()
    images = torch.randn(2, 3, *(8,) * rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = explain(net, images)
    features = net.features(images).detach()
    game = by_coalitions(net, features, 1)
    torch.testing.assert_close(got.weights, game, **TIGHT)
    assert got.raw.shape == (2, *features.shape[2:])


def test_token_networks_keep_what_the_transform_drops():
    """The class token is no map: it stays the image's in every coalition."""
    net = models.tokens().double()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def maps(tokens):
        return tokens[:, 1:].mT.unflatten(-1, (2, 2))

    tokens = net.features(net_tokens(net, images)).detach()
    got = explain(net, images, reshape_transform=maps, max_exact_maps=12)

    class View:
        @staticmethod
        def head(features):
            joined = torch.cat([tokens[:, :1], features.flatten(2).mT], 1)
            return net.fc(net.mix(joined)[:, 0])

    want = by_coalitions(View, maps(tokens), 1)
    torch.testing.assert_close(got.weights, want, **TIGHT)
    assert got.delta.abs().max() < 1e-12


def net_tokens(net: nn.Module, images: Tensor) -> Tensor:
    x = net.patches(images).flatten(2).mT
    return torch.cat([net.cls.expand(len(x), -1, -1), x], dim=1)


class Branching(Net):
    """Not captured: which way it goes depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(features) if features.sum() > -1e9 else self.head(-features)


def test_hook_path():
    twin, images = mlp(4), draw(3, 4)
    net = Branching(twin.features, *twin.head).eval()
    for options in ({}, {"exact": False, "n_orders": 6}, {"reference": draw(1, 4, seed=9)}):
        got, want = explain(net, images, **options), explain(twin, images, **options)
        torch.testing.assert_close(got.weights, want.weights, **CLOSE)
        torch.testing.assert_close(got.extra["standard_error"], want.extra["standard_error"], **CLOSE)
    assert got.delta.abs().max() < 1e-12


# --- axioms ---


@pytest.mark.parametrize("options", [{"exact": True}, {"exact": False, "n_orders": 6}], ids=["exact", "sampled"])
def test_dummies_get_exactly_nothing(options):
    net, images = mlp(5), draw(2, 5)
    base = draw(1, 5, seed=3)
    images[:, 3] = base[:, 3]
    got = explain(net, images, reference=base, **options)
    assert got.weights[:, 3].tolist() == [0.0, 0.0]
    assert got.extra["standard_error"][:, 3].tolist() == [0.0, 0.0]
    nothing = explain(net, base.expand(2, -1, -1, -1), reference=base, **options)
    assert not nothing.weights.any()
    assert nothing.delta.abs().max() < 1e-13
    with torch.no_grad():  # a map the head does not read
        net.head[2].weight[:, 4:8] = 0
    assert explain(net, images, **options).weights[:, 1].abs().max() < 1e-14


def test_symmetry():
    net, images = mlp(5), draw(2, 5)
    with torch.no_grad():
        net.head[2].weight[:, 16:20] = net.head[2].weight[:, :4]
    images[:, 4] = images[:, 0]
    got = explain(net, images).weights
    torch.testing.assert_close(got[:, 0], got[:, 4], **CLOSE)
    assert (got[:, 0] - got[:, 1]).abs().min() > 1e-4


def test_linearity():
    net, images = mlp(5), draw(2, 5)
    one, two = explain(net, images, 0).weights, explain(net, images, 2).weights
    joined = explain(net, images, lambda y: 2 * y[:, 0] - 3 * y[:, 2] + 7).weights
    torch.testing.assert_close(joined, 2 * one - 3 * two, **CLOSE)


# --- closed form ---


@pytest.mark.parametrize("base", [0.0, 0.3], ids=["zeros", "number"])
def test_closed_form_is_enumeration_is_lift_cam_is_ablation(base):
    net = models.gap_linear().double()
    images = torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    calls = []
    closed = explain(net, images, [[0, 1], [2, 3], [4, 0]], reference=base, progress=lambda *c: calls.append(c))
    assert closed.extra["estimator"] == "closed form"
    assert not closed.extra["standard_error"].any()
    assert not calls
    assert closed.delta.abs().max() < 1e-12
    game = game_of(net, images, torch.tensor([[0, 1], [2, 3], [4, 0]]), base)
    torch.testing.assert_close(closed.weights, method._exact(game), **CLOSE)
    sampled, error = method._sampled(game, method._orders(6, 1, False, 0))
    torch.testing.assert_close(closed.weights, sampled, **CLOSE)
    assert (error.isnan() | (closed.weights == 0)).all()
    passage = game.passage
    drops = passage.scores().unsqueeze(-1) - edited_scores(passage, base, 64)
    torch.testing.assert_close(closed.weights, drops, **CLOSE)
    if base == 0:
        lift = fastcam.attribute(net, images, "lift_cam", targets=passage.targets.indices, layer="features")
        torch.testing.assert_close(closed.weights, lift.weights, **CLOSE)


def test_closed_form_knows_no_limit_and_no_head_pass():
    net, images = models.gap_linear().double(), draw(2, 3, 8)
    for exact in (None, True, False):
        got = explain(net, images, exact=exact, max_exact_maps=2)
        assert got.extra["estimator"] == "closed form"
    base = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = explain(net, images, reference=base)
    assert got.delta.abs().max() < 1e-12
    weight = net.head[2].weight.detach()
    want = weight[1] * (net.features(images).detach() - base).mean((2, 3))
    torch.testing.assert_close(got.weights, want, **CLOSE)


# --- chunks, dtypes, errors ---


@pytest.mark.parametrize("options", [{"exact": True}, {"exact": False, "n_orders": 6}], ids=["exact", "sampled"])
def test_chunks_change_nothing(options):
    net, images = mlp(6), draw(3, 6)
    want = explain(net, images, [[0, 1]] * 3, **options)
    for chunk in (1, 5, 64, 4096):
        calls = []
        got = explain(
            net, images, [[0, 1]] * 3, chunk=chunk, progress=lambda *c, calls=calls: calls.append(c), **options
        )
        torch.testing.assert_close(got.weights, want.weights, **CLOSE)
        torch.testing.assert_close(got.extra["standard_error"], want.extra["standard_error"], **CLOSE)
        total = 3 * (2**6 - 2 if options["exact"] else 6 * 5)
        done = [0] + [one for one, _ in calls]
        assert done[-1] == total
        assert {all_ for _, all_ in calls} == {total}
        assert all(0 < after - before <= chunk for before, after in itertools.pairwise(done))


@pytest.mark.parametrize("exact", [True, False])
def test_the_trunk_runs_once(exact):
    ran = []

    @torch.library.custom_op(f"fastcam_tests::counted_{exact}", mutates_args=())
    def counted(x: Tensor) -> Tensor:
        ran.append(len(x))
        return x.clone()

    counted.register_fake(lambda x: torch.empty_like(x))

    class Trunk(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return counted(x)

    net = Net(Trunk(), *mlp(5).head).eval()
    explainer = fastcam.Explainer(net, "shap_cam", layer="features", exact=exact)
    explainer(draw(3, 5), 1)
    ran.clear()
    explainer(draw(3, 5), 1)
    assert ran == [3]


def test_progress_may_be_bound_to_what_cannot_be_copied(tmp_path):
    class Bar:
        def __init__(self, file):
            self.file = file

        def update(self, done, total):
            self.file.write(f"{done}/{total}\n")

    with open(tmp_path / "log", "w") as file:
        bar = Bar(file)
        got = explain(mlp(3), draw(1, 3), progress=bar.update)
    assert got.options["progress"] == bar.update
    assert (tmp_path / "log").read_text().endswith("6/6\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    net, images = mlp(4), draw(2, 4)
    want = explain(net, images).weights
    got = explain(net.to(dtype), images.to(dtype))
    assert got.weights.dtype == got.delta.dtype == got.extra["standard_error"].dtype == torch.float32
    scale = want.abs().max().item()
    # bfloat16 logits carry 8 bits; a value is a weighted mean of differences of them
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.weights.double(), want, rtol=0, atol=tolerance * scale)


def test_empty_batch():
    got = explain(mlp(3), draw(0, 3), [])
    assert got.weights.shape == got.extra["standard_error"].shape == (0, 3)
    assert got.maps.shape == (0, 4, 4)


def test_features_that_are_not_finite_are_that_images_affair():
    net, images = mlp(4), draw(3, 4)
    want = explain(net, images)
    images[1, 2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite for image 1"):
        explain(net, images)
    got = explain(net, images, on_nonfinite="mask")
    assert got.valid.tolist() == [True, False, True]
    torch.testing.assert_close(got.weights[::2], want.weights[::2], **CLOSE)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n_orders": 0}, ValueError, "n_orders must be at least 1; got 0"),
        ({"n_orders": -2}, ValueError, "n_orders must be at least 1; got -2"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1; got 0"),
        ({"max_exact_maps": 21}, ValueError, "max_exact_maps must be 0 to 20; got 21"),
        ({"exact": "yes"}, ValueError, "exact must be None, True or False; got 'yes'"),
        ({"reference": "black"}, TypeError, "a number or a tensor of layer features; got str"),
        ({"reference": torch.nan}, ValueError, "reference is not finite"),
        ({"progress": 3}, TypeError, "progress must be a callable"),
        ({"orders": 3}, TypeError, "did you mean 'n_orders'"),
        ({"reference": torch.zeros(3, 4, 4)}, ValueError, r"broadcast to the layer's features, \(2, 4, 4, 4\); got"),
        ({"reference": torch.zeros(3, 4, 4, 4)}, ValueError, r"broadcast to .* got \(3, 4, 4, 4\)"),
        ({"reference": torch.zeros(1, 2, 4, 4, 4)}, ValueError, "broadcast to"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors(options, error, text):
    with pytest.raises(error, match=text):
        explain(mlp(4), draw(2, 4), **options)
