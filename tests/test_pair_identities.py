"""SFAM's identities, by their numbers in the order of its formulas: what must hold whatever the network.

Beside `tests/ops/test_similarity_weights.py` (invariances of the op) and `tests/test_pairs.py` (2, 5, 9 a, 10, 11, 12).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam

torch.set_num_threads(1)


class Given(nn.Module):
    """Images that are feature maps, perhaps in another order of channels."""

    def __init__(self, order=None):
        super().__init__()
        self.order = order

    def forward(self, images):
        x = images.relu()
        return x if self.order is None else x[:, self.order]


def maps(seed: int, count: int = 3, channels: int = 9, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, channels, 5, 6), generator=generator, dtype=torch.float64).to(dtype)


def pair(a: torch.Tensor, b: torch.Tensor, model: nn.Module | None = None, **options) -> fastcam.PairAttribution:
    settings = {"embedding": "avg", "size": "layer"} | options
    return fastcam.attribute_pair(model or Given().eval(), a, b, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_1_contributions_add_up(dtype):
    a, b = maps(1, dtype=dtype), maps(2, dtype=dtype)
    u, v = a.double().mean((2, 3)), b.double().mean((2, 3))
    for options, total in (({}, functional.cosine_similarity(u, v)), ({"metric": "euclidean"}, -((u - v) ** 2).sum(1))):
        found = pair(a, b, **options)
        torch.testing.assert_close(found.contributions.double().sum(1), total, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.score.double(), total, rtol=0, atol=1e-6)
        ratio = pair(a, b, weighting="ratio", relu=False, **options).weights.double().sum(1)
        torch.testing.assert_close(ratio, total.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_3_permutations_of_channels_and_of_places(metric):
    a, b = maps(1), maps(2)
    plain = pair(a, b, metric=metric)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    turned = pair(a, b, Given(order).eval(), metric=metric)
    torch.testing.assert_close(turned.weights, plain.weights[:, order])
    torch.testing.assert_close(turned.contributions, plain.contributions[:, order])
    torch.testing.assert_close(turned.maps_a, plain.maps_a)
    torch.testing.assert_close(turned.maps_b, plain.maps_b)
    places = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = pair(a.flatten(2)[..., places].unflatten(2, (5, 6)), b, metric=metric)
    torch.testing.assert_close(moved.weights, plain.weights)
    torch.testing.assert_close(moved.maps_a, plain.maps_a.flatten(1)[:, places].unflatten(1, (5, 6)))
    torch.testing.assert_close(moved.maps_b, plain.maps_b)


def test_6_a_channel_dead_in_one_image():
    a, b = maps(1), maps(2)
    a[:, 4] = 0
    y = b.mean((2, 3))
    cosine, euclidean = pair(a, b), pair(a, b, metric="euclidean")
    assert cosine.contributions[:, 4].tolist() == [0, 0, 0]
    assert cosine.weights[:, 4].tolist() == [0, 0, 0]  # the smallest weight, as all contributions are positive
    torch.testing.assert_close(euclidean.contributions[:, 4], -(y[:, 4] ** 2))


def test_7_contributions_are_no_gradients_of_the_similarity():
    a, b = maps(1), maps(2)
    x, y = a.mean((2, 3)).requires_grad_(), b.mean((2, 3))
    found = pair(a, b)
    length = x.norm(dim=1, keepdim=True)
    (constant_norms,) = torch.autograd.grad((x * y / (length.detach() * y.norm(dim=1, keepdim=True))).sum(), x)
    torch.testing.assert_close((x * constant_norms).detach(), found.contributions)
    (whole,) = torch.autograd.grad(functional.cosine_similarity(x, y).sum(), x)
    x = x.detach()
    unit, other = (functional.normalize(each) for each in (x, y))
    torch.testing.assert_close(whole, (other - found.score.unsqueeze(1) * unit) / x.norm(dim=1, keepdim=True))
    torch.testing.assert_close((x * whole).sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert ((x * whole) < 0).any()  # where Grad-CAM subtracts, the contributions are all positive
    assert (found.contributions > 0).all()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(-((x - y) ** 2).sum(), x)
    torch.testing.assert_close(slope, -2 * (x - y).detach())
    euclidean = pair(a, b, metric="euclidean").contributions
    torch.testing.assert_close(euclidean, (slope * (x - y) / 2).detach())
    assert (slope > 0).any()
    assert (euclidean <= 0).all()


def test_8_weights_are_pulled_back_by_the_projection():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)).double().eval()
    a, b = maps(1, channels=3), maps(2, channels=3)
    found = fastcam.attribute_pair(model, a, b)
    for side in ("channel_weights_a", "channel_weights_b"):
        torch.testing.assert_close(found.extra[side], (found.weights @ model[3].weight).detach())
    plain = pair(a, b, body.double())
    assert torch.equal(plain.extra["channel_weights_a"], plain.weights)


def test_9_on_vectors_of_length_one():
    """`cross` ranks as the cosine does, `neg_sq` otherwise, although -d^2 = 2 S - 2."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.randn((40, 256, 1, 2), generator=generator, dtype=torch.float64).abs() for _ in range(2))
    unit = {"metric": "euclidean", "normalize_embedding": True}
    cosine, cross = pair(u, v), pair(u, v, euclidean_term="cross", **unit)
    torch.testing.assert_close(cross.weights, cosine.weights)
    torch.testing.assert_close(cross.maps_a, cosine.maps_a)
    squared = pair(u, v, euclidean_term="neg_sq", **unit)
    torch.testing.assert_close(squared.score, 2 * cosine.score - 2)
    ranks = [each.weights.argsort(1).argsort(1).double() for each in (cosine, squared)]
    ranks = [each - each.mean(1, keepdim=True) for each in ranks]
    likeness = functional.cosine_similarity(*ranks)  # Spearman's
    assert likeness.abs().mean() < 0.15
    assert likeness.abs().max() < 0.4
