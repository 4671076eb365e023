"""SHAP-CAM by a sample of orders: against a loop over the same orders, exact values, and its own standard errors."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fastcam._testing.models import seeded
from fastcam._testing.shap_games import by_orders, draw, explain, game_of, head_only, mlp, pick
from fastcam.methods import shap_cam as method

TIGHT = {"rtol": 0, "atol": 1e-10}
CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("n_orders", [1, 2, 5, 32])
def test_sampled_telescopes(n_orders, antithetic):
    net, images = mlp(6), draw(3, 6)
    got = explain(net, images, exact=False, n_orders=n_orders, antithetic=antithetic)
    assert got.extra["estimator"] == "sampled"
    assert got.delta.abs().max() < 1e-13
    gained = (net(images) - net.head(torch.zeros_like(images)))[:, 1]
    torch.testing.assert_close(got.weights.sum(1), gained, **CLOSE)
    units = math.ceil(n_orders / 2) if antithetic else n_orders
    assert bool(got.extra["standard_error"].isnan().all()) == (units == 1)
    assert got.options["n_orders"] == (2 * units if antithetic else n_orders)


def test_sampled_over_all_orders_is_exact():
    game = game_of(mlp(5), draw(3, 5))
    orders = torch.tensor(list(itertools.permutations(range(5))))
    for units in (orders.unsqueeze(1), orders.unflatten(0, (20, 6))):
        values, _ = method._sampled(game, units)
        torch.testing.assert_close(values, method._exact(game), **CLOSE)


def test_sampled_is_the_walk_along_its_orders():
    """Means and standard errors from a loop over units, orders and maps."""
    net, images = mlp(4), draw(2, 4)
    orders = method._orders(4, 10, True, seed=3)
    assert orders.shape == (5, 2, 4)
    assert torch.equal(orders[:, 1], orders[:, 0].flip(-1))
    found = torch.zeros(5, 2, 4, dtype=torch.float64)
    for unit in range(5):
        for order in orders[unit].tolist():
            mixed = torch.zeros_like(images)
            before = net.head(mixed)[:, 1].detach()
            for k in order:
                mixed[:, k] = images[:, k]
                after = net.head(mixed)[:, 1].detach()
                found[unit, :, k] += (after - before) / 2
                before = after
    got = explain(net, images, exact=False, n_orders=10, seed=3, chunk=7)
    torch.testing.assert_close(got.weights, found.mean(0), **CLOSE)
    torch.testing.assert_close(got.extra["standard_error"], found.std(0) / math.sqrt(5), **CLOSE)


class Pairwise(nn.Module):
    """Scores with a constant, linear terms and products of two maps' means, nothing higher."""

    def __init__(self, maps: int):
        super().__init__()
        self.linear = nn.Linear(maps, 2)
        self.pairs = nn.Parameter(torch.randn(2, maps, maps))

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean((2, 3))
        return self.linear(mean) + torch.einsum("bi,cij,bj->bc", mean, self.pairs, mean)


def test_one_antithetic_pair_is_exact_for_pairwise_games():
    net, images = seeded(lambda: head_only(Pairwise(6))), draw(3, 6)
    want = by_orders(net, images, torch.zeros_like(images), pick(1))
    for seed in range(3):
        pair = explain(net, images, exact=False, n_orders=2, seed=seed)
        torch.testing.assert_close(pair.weights, want, **TIGHT)
    single = explain(net, images, exact=False, n_orders=1, antithetic=False)
    assert (single.weights - want).abs().max() > 1e-3


def test_seeds():
    net, images = mlp(6), draw(2, 6)
    options = {"exact": False, "n_orders": 4}
    one, again = (explain(net, images, seed=5, **options).weights for _ in range(2))
    other = explain(net, images, seed=6, **options).weights
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-4
    state = torch.get_rng_state()
    explain(net, images, **options)
    assert torch.equal(state, torch.get_rng_state())


def test_orders_are_the_same_for_all_images():
    net, images = mlp(6), draw(4, 6)
    together = explain(net, images, exact=False, n_orders=4)
    for row in range(4):
        alone = explain(net, images[row : row + 1], exact=False, n_orders=4)
        torch.testing.assert_close(alone.weights[0], together.weights[row], **CLOSE)


def test_neighbours_with_other_dead_maps_change_nothing():
    """Which maps are varied depends on the batch, what comes out does not."""
    net, images = mlp(6), draw(3, 6)
    images[0, 2] = images[1, 4] = images[:, 1] = 0
    for options in ({"exact": True}, {"exact": False, "n_orders": 4}):
        together = explain(net, images, **options)
        for row in range(3):
            alone = explain(net, images[row : row + 1], **options)
            torch.testing.assert_close(alone.weights[0], together.weights[row], **CLOSE)
        assert not together.weights[:, 1].any()
        assert not together.weights[0, 2]
        assert not together.weights[1, 4]
        assert (together.weights != 0).sum() == 13
        assert together.delta.abs().max() < 1e-12


def test_standard_errors_shrink_and_cover():
    """Fixed seeds: with 8 times the units errors fall by sqrt(8), and over 40 seeds z-scores look standard normal.

    Bands: z of 64 units has variance 63 / 61 and |z| < 2 in 95 of 100 draws; its mean square over 40 seeds, 2 images
    and 5 maps that are free (their sum is known) scatters by some 0.15.
    """
    game = game_of(mlp(6, seed=2), draw(2, 6, seed=4), chunk=8192)
    want = method._exact(game)
    found = [method._sampled(game, method._orders(6, 64, False, seed)) for seed in range(40)]
    z = torch.stack([(values - want) / error for values, error in found])
    assert 0.91 < (z.abs() < 2).double().mean() < 0.99
    assert 0.6 < z.square().mean() < 1.5
    many, error = method._sampled(game, method._orders(6, 512, False, 99))
    ratio = torch.stack([few for _, few in found]).mean(0) / error
    assert ((0.85 * math.sqrt(8) < ratio) & (ratio < 1.15 * math.sqrt(8))).all()
    assert (many - want).norm() < sum((values - want).norm() for values, _ in found) / 40


def test_many_maps_are_sampled_by_default():
    net, images = mlp(17, side=2), draw(1, 17, side=2)
    got = explain(net, images, n_orders=4)
    assert got.extra["estimator"] == "sampled"
    with pytest.raises(ValueError, match=r"2\^17 .* layer 'features'.* exact=False to sample n_orders"):
        explain(net, images, exact=True)
    few = explain(mlp(6), draw(1, 6), max_exact_maps=5)
    assert few.extra["estimator"] == "sampled"


# --- the LIFT-CAM paper's claim, on the benchmark's random heads ---


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "faithfulness" / "bench_shap.py"
    if not path.is_file():
        pytest.skip("not in a checkout")
    spec = importlib.util.spec_from_file_location("bench_shap", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lift_cam_is_nearest_to_shap_on_random_heads(bench):
    """60 fixed draws. With biases that matter the paper's order holds by more than the figures' standard errors."""
    found = bench.rows("heads", bench.random_heads(60, "normal biases"))
    means = {row["name"].removeprefix("heads: "): row["mean"] for row in found}
    assert means["lift_cam"] >= 0.85
    assert means["shap_cam, 100 orders"] >= 0.99
    assert bench.ordered("heads", found), means


def test_lift_cam_is_gradient_x_activation_without_biases(bench):
    for shap, others in bench.random_heads(3, "no biases"):
        torch.testing.assert_close(others["lift_cam"], others["gradient x activation"], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(shap, others["lift_cam"], rtol=1e-3)
