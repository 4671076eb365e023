"""Pairs: SFAM against formulas written out here in float64, its identities, galleries, prototypes and bad input."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam.program.capture import capture

SIZE = 24


class Embedder(nn.Module):
    """Two convolutions, then one of several heads."""

    def __init__(self, head: str, maps: int = 6, channels: int = 5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, maps, 3, stride=2, padding=1), nn.ReLU()
        )
        self.head = head
        self.linear = nn.Linear(maps, channels)
        self.mlp = nn.Sequential(nn.Linear(maps, 9), nn.ReLU(), nn.Linear(9, channels))
        self.neck = nn.BatchNorm1d(maps)
        self.neck.running_mean.normal_()
        self.neck.running_var.uniform_(0.5, 2)
        self.neck.weight.data.normal_()

    def embed(self, features):
        head = self.head.removesuffix("_unit")
        if head == "gem":
            return features.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
        if head == "max":
            return features.amax((2, 3))
        z = features.mean((2, 3))
        if head == "neck":
            return self.neck(z)
        return {"none": lambda x: x, "linear": self.linear, "mlp": self.mlp}[head](z)

    def forward(self, images):
        z = self.embed(self.features(images))
        return functional.normalize(z) if self.head.endswith("_unit") else z


HEADS = ("none", "linear", "mlp", "neck", "gem", "max", "linear_unit", "mlp_unit")


def network(head: str, seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(head).double().eval()


def pictures(count: int, seed: int = 1, size: int = SIZE) -> torch.Tensor:
    return torch.randn((count, 3, size, size + 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(model: Embedder, a: torch.Tensor, b: torch.Tensor, metric: str = "cosine", weighting: str = "minmax"):
    """Maps at layer size, contributions, weights and similarity, pair by pair with autograd and loops."""
    found = []
    for image_a, image_b in zip(a, b, strict=True):
        layers = [model.features(image[None]).detach().requires_grad_() for image in (image_a, image_b)]
        u, v = (model.embed(layer)[0] for layer in layers)
        x, y = u.detach(), v.detach()
        if metric == "cosine":
            c = x * y / (x.norm() * y.norm())
        else:
            if model.head.endswith("_unit"):
                x, y = x / x.norm(), y / y.norm()
            c = -((x - y) ** 2)
        ratio = c / c.sum().abs()
        w = {"raw": c, "ratio": ratio, "minmax": (ratio - ratio.min()) / (ratio.max() - ratio.min())}[weighting]
        maps = []
        for layer, z in zip(layers, (u, v), strict=True):
            (gradient,) = torch.autograd.grad((w * z).sum(), layer)
            m = (gradient.sum((2, 3))[..., None, None] * layer.detach()).sum(1)[0].relu()
            maps.append((m - m.min()) / (m.max() - m.min()) if m.max() > m.min() else torch.zeros_like(m))
        found.append((*maps, c, w, c.sum()))
    return [torch.stack(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("head", HEADS)
def test_formula(head, metric):
    model, a, b = network(head), pictures(3), pictures(3, 2)
    result = fastcam.attribute_pair(model, a, b, metric=metric, size="layer")
    maps_a, maps_b, c, w, score = expected(model, a, b, metric)
    torch.testing.assert_close(result.contributions, c)
    torch.testing.assert_close(result.weights, w)
    torch.testing.assert_close(result.score, score)
    torch.testing.assert_close(result.maps_a, maps_a)
    torch.testing.assert_close(result.maps_b, maps_b)
    assert result.maps_a.amax((1, 2)).tolist() == [1, 1, 1]
    assert result.valid.all()
    assert not result.extra["degenerate"].any()


@pytest.mark.parametrize("weighting", ["ratio", "raw"])
def test_weighting(weighting):
    model, a, b = network("mlp"), pictures(3), pictures(3, 2)
    result = fastcam.attribute_pair(model, a, b, weighting=weighting, size="layer")
    maps_a, maps_b, _, w, _ = expected(model, a, b, weighting=weighting)
    torch.testing.assert_close(result.weights, w)
    torch.testing.assert_close(result.maps_a, maps_a)
    torch.testing.assert_close(result.maps_b, maps_b)


def test_ratio_and_raw_give_the_same_maps():
    model, a, b = network("none"), pictures(2), pictures(2, 2)
    ratio, raw = (fastcam.attribute_pair(model, a, b, weighting=each).maps_a for each in ("ratio", "raw"))
    torch.testing.assert_close(ratio, raw)


@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
def test_pooled_features_are_embeddings_too(pool):
    """As the network that ends in that pooling, whose head is pulled back by autograd."""
    model, a, b = network("linear"), pictures(2), pictures(2, 2)
    same = network({"avg": "none"}.get(pool, pool))
    same.load_state_dict(model.state_dict())
    found = fastcam.attribute_pair(model, a, b, embedding=pool)
    other = fastcam.attribute_pair(same, a, b)
    torch.testing.assert_close(found.contributions, other.contributions)
    torch.testing.assert_close(found.maps_a, other.maps_a)
    torch.testing.assert_close(found.extra["channel_weights_b"], other.extra["channel_weights_b"])


def test_symmetry_and_images_of_two_sizes():
    model, a, b = network("linear"), pictures(3), pictures(3, 2, size=32)
    one, other = fastcam.attribute_pair(model, a, b), fastcam.attribute_pair(model, b, a)
    assert one.maps_a.shape == (3, 24, 28)
    assert one.maps_b.shape == (3, 32, 36)
    torch.testing.assert_close(one.maps_a, other.maps_b)
    torch.testing.assert_close(one.maps_b, other.maps_a)
    torch.testing.assert_close(one.score, other.score)


def test_identical_images_under_cosine():
    model, a = network("linear"), pictures(2)
    result = fastcam.attribute_pair(model, a, a)
    z = model(a)
    torch.testing.assert_close(result.contributions, (z / z.norm(dim=1, keepdim=True)).square().detach())
    torch.testing.assert_close(result.score, torch.ones(2, dtype=torch.float64))
    assert torch.equal(result.maps_a, result.maps_b)


def test_identical_images_under_euclidean_are_degenerate():
    model, a = network("none"), pictures(2)
    result = fastcam.attribute_pair(model, a, a, metric="euclidean", size="layer", normalize=False)
    assert result.extra["degenerate"].all()
    assert result.score.tolist() == [0, 0]
    torch.testing.assert_close(result.maps_a, model.features(a).sum(1).detach())


def test_spatial_mean_of_the_raw_map():
    """mean_ij sum_k c_k A_k = sum_k c_k x_k, and of the similarity map by dot products it is the cosine."""
    model, a, b = network("none"), pictures(2), pictures(2, 2)
    result = fastcam.attribute_pair(model, a, b, weighting="raw", relu=False)
    x, y = model(a).detach(), model(b).detach()
    torch.testing.assert_close(result.raw_a.mean((1, 2)), (result.contributions * x).sum(1))
    dots = torch.einsum("bkhw,bk->bhw", model.features(a).detach(), y) / (x.norm(dim=1) * y.norm(dim=1))[:, None, None]
    torch.testing.assert_close(dots.mean((1, 2)), result.score)


def test_plant():
    """A blob of one shared channel at different places, and a private channel each: both maps peak at their blob."""

    class Planted(nn.Module):
        def forward(self, images):
            return images.relu()

    a = torch.zeros(1, 3, 12, 12)
    b = torch.zeros(1, 3, 12, 12)
    a[0, 0, 2, 3], b[0, 0, 9, 7] = 10, 10
    a[0, 1, 8, 8], b[0, 2, 1, 1] = 9, 9
    result = fastcam.attribute_pair(Planted().eval(), a, b, embedding="avg")
    assert divmod(int(result.maps_a[0].argmax()), 12) == (2, 3)
    assert divmod(int(result.maps_b[0].argmax()), 12) == (9, 7)


def test_batch_is_its_pairs():
    model, a, b = network("mlp").float(), pictures(4).float(), pictures(4, 2).float()
    explainer = fastcam.PairExplainer(model)
    together = explainer(a, b)
    for i in range(4):
        alone = explainer(a[i : i + 1], b[i : i + 1])
        torch.testing.assert_close(alone.maps_a[0], together.maps_a[i])
        torch.testing.assert_close(alone.contributions[0], together.contributions[i])


@pytest.mark.parametrize("head", ["none", "linear", "mlp"])
def test_one_against_many_and_all_against_all(head):
    model, a, b = network(head), pictures(3), pictures(5, 2)
    explainer = fastcam.PairExplainer(model, metric="euclidean")
    gallery = explainer.gallery(b, chunk=2)
    table = explainer.cross(a, gallery)
    assert table.maps_a.shape == (3, 5, 24, 28)
    for i in range(3):
        row = explainer(a[i : i + 1], gallery)
        pairs = explainer(a[i].expand(5, -1, -1, -1), b)
        for name in ("maps_a", "maps_b", "raw_a", "contributions", "weights", "score", "valid"):
            torch.testing.assert_close(getattr(row, name), getattr(pairs, name))
            torch.testing.assert_close(getattr(table, name)[i], getattr(pairs, name))
        torch.testing.assert_close(table.extra["channel_weights_b"][i], pairs.extra["channel_weights_b"])
    back = explainer(gallery, a[:1])
    torch.testing.assert_close(back.maps_a, table.maps_b[0])


def test_gallery_is_cut_and_made_of_batches():
    model, b = network("linear"), pictures(6, 2)
    explainer = fastcam.PairExplainer(model)
    gallery = explainer.gallery([b[:4], b[4:]], labels=range(6))
    assert len(gallery) == 6
    part = gallery[torch.tensor([4, 1])]
    assert part.labels.tolist() == [4, 1]
    torch.testing.assert_close(explainer(pictures(2), part).maps_b, explainer(pictures(2), b[[4, 1]]).maps_b)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_single_neighbour_is_the_plain_pair(metric):
    model, a, b = network("mlp"), pictures(3), pictures(3, 2)
    explainer = fastcam.PairExplainer(model, metric=metric)
    pair = explainer(a, b)
    found = explainer.against(a, b, torch.arange(3).unsqueeze(1))
    torch.testing.assert_close(found.contributions, pair.contributions)
    torch.testing.assert_close(found.maps_a, pair.maps_a)
    torch.testing.assert_close(found.maps_b[:, 0], pair.maps_b)


def test_neighbours_vote():
    model, a, b = network("linear"), pictures(4), pictures(9, 2)
    labels = torch.tensor([0, 1, 2] * 3)
    explainer = fastcam.PairExplainer(model)
    gallery = explainer.gallery(b, labels)
    result = explainer.neighbours(a, gallery, k_neighbors=5, temperature=0.2)
    u, m = (functional.normalize(model(x)).detach() for x in (a, b))
    for i in range(4):
        cos = m @ u[i]
        nearest = cos.argsort(descending=True)[:5]
        votes = [sum(math.exp(cos[j] / 0.2) for j in nearest if labels[j] == label) for label in range(3)]
        winner = max(range(3), key=votes.__getitem__)
        assert result.extra["predicted"][i] == winner
        chosen = [j for j in nearest.tolist() if labels[j] == winner]
        c = (u[i] * m[chosen]).mean(0)
        torch.testing.assert_close(result.contributions[i], c)
        torch.testing.assert_close(result.score[i], cos[chosen].mean())
        for place, j in enumerate(nearest.tolist()):
            shown = result.maps_b[i, place]
            assert bool(shown.any()) == (j in chosen)
    with pytest.raises(ValueError, match="labels="):
        explainer.neighbours(a, explainer.gallery(b))
    with pytest.raises(ValueError, match="k_neighbors must be"):
        explainer.neighbours(a, gallery, k_neighbors=0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_prototypes(metric):
    model, a, b = network("linear"), pictures(4), pictures(7, 2)
    labels = torch.tensor([5, 9, 5, 9, 9, 5, 9])
    explainer = fastcam.PairExplainer(model, metric=metric)
    gallery = explainer.gallery(b, labels)
    result = explainer.prototypes(a, gallery)
    u, m = model(a).detach(), model(b).detach()
    if metric == "cosine":
        u, m = functional.normalize(u), functional.normalize(m)
    middle = torch.stack([m[labels == label].mean(0) for label in (5, 9)])
    scores = u @ middle.T if metric == "cosine" else -torch.cdist(u, middle).square()
    assert result.extra["predicted"].tolist() == [(5, 9)[i] for i in scores.argmax(1)]
    torch.testing.assert_close(result.score, scores.amax(1))
    assert result.extra["chosen"].sum(1).tolist() == [int((labels == p).sum()) for p in result.extra["predicted"]]
    fixed = explainer.prototypes(a, gallery, targets=9)
    torch.testing.assert_close(fixed.score, scores[:, 1])
    with pytest.raises(ValueError, match="no image of label 4"):
        explainer.prototypes(a, gallery, targets=4)


def test_dissimilarity_ranks_the_other_way_round():
    model, a, b = network("none"), pictures(2), pictures(2, 2)
    plain = fastcam.attribute_pair(model, a, b)
    turned = fastcam.attribute_pair(model, a, b, dissimilarity=True)
    torch.testing.assert_close(turned.weights, 1 - plain.weights)
    torch.testing.assert_close(turned.contributions, -plain.contributions)
    torch.testing.assert_close(turned.score, plain.score)


NORMALISED = {
    "normalize": lambda z: functional.normalize(z),
    "norm": lambda z: z / z.norm(dim=-1, keepdim=True),
    "root": lambda z: z / torch.sqrt((z**2).sum(1, keepdim=True) + 1e-9),
    "rsqrt": lambda z: z * torch.rsqrt((z * z).sum(1, keepdim=True)),
    "power": lambda z: z / z.pow(2).sum(1).sqrt().unsqueeze(1),
    "indexed": lambda z: z / torch.linalg.norm(z, dim=1)[:, None],
    "transposed": lambda z: (z.t() / z.norm(dim=1)).t(),
    "maps": lambda z: functional.normalize(z[:, :, None, None], dim=1).flatten(1),
    "retrieval": lambda z: _squeezed(z[:, :, None, None]),
    "scaled": lambda z: functional.normalize(z) * 16,
    "copied": lambda z: functional.normalize(z).contiguous().clone(),
    "twice": lambda z: functional.normalize(functional.normalize(z)),
}


def _squeezed(x):
    return (x / (x.norm(p=2, dim=1, keepdim=True) + 1e-9).expand_as(x)).squeeze(-1).squeeze(-1)


def ending(function) -> nn.Module:
    class Ending(Embedder):
        def forward(self, images):
            return function(super().forward(images))

    torch.manual_seed(0)
    return Ending("mlp").double().eval()


@pytest.mark.parametrize("form", list(NORMALISED))
def test_a_final_normalisation_is_looked_behind(form):
    """Cosine as of the raw embeddings; Euclidean of the network's own output, pulled back from the raw embeddings."""
    model = ending(NORMALISED[form])
    raw = network("mlp")
    raw.load_state_dict(model.state_dict())
    a, b = pictures(2), pictures(2, 2)
    found, other = fastcam.attribute_pair(model, a, b), fastcam.attribute_pair(raw, a, b)
    torch.testing.assert_close(found.maps_a, other.maps_a)
    torch.testing.assert_close(found.contributions, other.contributions)
    euclidean = fastcam.attribute_pair(model, a, b, metric="euclidean", size="layer")
    u, v = model(a).detach(), model(b).detach()
    torch.testing.assert_close(euclidean.score, -(u - v).square().sum(1), rtol=1e-6, atol=1e-8)
    c = -((u - v) ** 2)
    w = (c - c.amin(1, keepdim=True)) / (c.amax(1, keepdim=True) - c.amin(1, keepdim=True))
    features = raw.features(a).detach().requires_grad_()
    (gradient,) = torch.autograd.grad((w * raw.embed(features)).sum(), features)
    m = (gradient.sum((2, 3))[..., None, None] * features.detach()).sum(1).relu()
    torch.testing.assert_close(euclidean.raw_a, m, rtol=1e-5, atol=1e-7)


OTHERWISE = {
    "sum": lambda z: z / z.sum(1, keepdim=True),
    "square": lambda z: z / (z * z).sum(1, keepdim=True),
    "times": lambda z: z * z.norm(dim=1, keepdim=True),
    "one more": lambda z: z / (1 + z.norm(dim=1, keepdim=True)),
    "clamped": lambda z: z / z.norm(dim=1, keepdim=True).clamp(min=5),
    "half": lambda z: z / z.norm(dim=1, keepdim=True).sqrt(),
}


@pytest.mark.parametrize("form", list(OTHERWISE))
def test_what_is_no_normalisation_is_part_of_the_network(form):
    model, a, b = ending(OTHERWISE[form]), pictures(2), pictures(2, 2)
    result = fastcam.attribute_pair(model, a, b, metric="euclidean")
    u, v = model(a).detach(), model(b).detach()
    torch.testing.assert_close(result.score, -(u - v).square().sum(1))
    features = model.features(a).detach().requires_grad_()
    z = OTHERWISE[form](model.embed(features))
    (gradient,) = torch.autograd.grad((result.weights * z).sum(), features)
    torch.testing.assert_close(result.extra["channel_weights_a"], gradient.sum((2, 3)))


def test_a_normalisation_that_cannot_be_looked_behind_is_refused():
    model = ending(lambda z: torch.cat([torch.cos(z), torch.sin(z)], 1))  # of length sqrt(5) whatever z is
    with pytest.raises(RuntimeError, match="all have length 2"):
        fastcam.attribute_pair(model, pictures(2), pictures(2, 2))


def test_models_are_let_go():
    model, a = network("linear_unit"), pictures(1)
    fastcam.attribute_pair(model, a, a)
    gone = weakref.ref(capture(model, a))
    del model
    gc.collect()
    assert gone() is None


class Uncapturable(Embedder):
    def forward(self, images):
        if images.sum() > 1e9:  # a branch on values stops torch.export
            return images.mean((2, 3))
        return super().forward(images)


def test_networks_that_cannot_be_captured_go_through_a_hook():
    torch.manual_seed(0)
    model = Uncapturable("mlp").double().eval()
    plain = network("mlp")
    plain.load_state_dict(model.state_dict())
    found = fastcam.attribute_pair(model, pictures(2), pictures(2, 2), layer="features")
    torch.testing.assert_close(found.maps_b, fastcam.attribute_pair(plain, pictures(2), pictures(2, 2)).maps_b)
    explainer = fastcam.PairExplainer(model, layer="features")
    with pytest.raises(ValueError, match="captured"):
        explainer.cross(pictures(2), pictures(3, 2))
    with pytest.raises(ValueError, match="one for one"):
        explainer(pictures(3), explainer.gallery(pictures(3, 2)))
    assert explainer(pictures(0), pictures(0)).maps_a.shape == (0, 24, 28)
    torch.manual_seed(0)
    unit = Uncapturable("mlp_unit").double().eval()
    with pytest.raises(RuntimeError, match="length 1"):
        fastcam.attribute_pair(unit, pictures(2), pictures(2, 2), layer="features")
    fastcam.attribute_pair(unit, pictures(2), pictures(2, 2), layer="features", embedding="avg")


def test_a_layer_with_a_way_around_it_explains_pairs_but_keeps_no_gallery():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, images):
            x = self.first(images).relu()
            return (self.second(x) + x).relu().mean((2, 3))

    torch.manual_seed(0)
    model, a, b = Skipping().double().eval(), pictures(2), pictures(2, 2)
    result = fastcam.attribute_pair(model, a, b, layer="second", size="layer", normalize=False, weighting="raw")
    x = [model.first(images).relu() for images in (a, b)]
    features = [model.second(one).detach().requires_grad_() for one in x]
    z = [(f + one).relu().mean((2, 3)) for f, one in zip(features, x, strict=True)]
    w = functional.normalize(z[0]) * functional.normalize(z[1])
    (gradient,) = torch.autograd.grad((w.detach() * z[0]).sum(), features[0])
    torch.testing.assert_close(
        result.raw_a, (gradient.sum((2, 3))[..., None, None] * features[0]).sum(1).relu().detach()
    )
    explainer = fastcam.PairExplainer(model, layer="second")
    with pytest.raises(ValueError, match="another way"):
        explainer(a, explainer.gallery(b))


def test_signals_and_volumes():
    torch.manual_seed(0)
    wave = nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    result = fastcam.attribute_pair(wave, torch.randn(2, 2, 30), torch.randn(2, 2, 30))
    assert result.maps_a.shape == (2, 30)
    assert result.maps_a.amax(1).tolist() == [1, 1]
    volume = nn.Sequential(nn.Conv3d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    result = fastcam.attribute_pair(volume, torch.randn(2, 1, 6, 7, 8), torch.randn(2, 1, 6, 7, 8))
    assert result.maps_b.shape == (2, 6, 7, 8)


def test_tokens_by_reshape_transform():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, 4)
            self.block = nn.Linear(8, 8)

        def forward(self, images):
            x = self.patch(images).flatten(2).transpose(1, 2)
            return functional.gelu(self.block(x)).mean(1)

    torch.manual_seed(0)
    model = Tokens().double().eval()
    a, b = pictures(2), pictures(2, 2)

    def square(tokens):
        return tokens.transpose(1, 2).unflatten(2, (6, 7))

    result = fastcam.attribute_pair(model, a, b, layer="block", reshape_transform=square, size="layer")
    assert result.maps_a.shape == (2, 6, 7)
    explainer = fastcam.PairExplainer(model, layer="block", reshape_transform=square, size="layer")
    torch.testing.assert_close(explainer(a, explainer.gallery(b)).maps_b, result.maps_b)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision):
    model, a, b = network("linear").float(), pictures(2).float(), pictures(2, 2).float()
    full = fastcam.attribute_pair(model, a, b)
    half = fastcam.PairExplainer(model, precision=precision)(a, b)
    assert half.contributions.dtype == torch.float32
    torch.testing.assert_close(half.score, full.score, atol=2e-2, rtol=2e-2)
    for one, other in ((half.maps_a, full.maps_a), (half.maps_b, full.maps_b)):
        assert functional.cosine_similarity(one.flatten(1), other.flatten(1)).min() > 0.99


def test_the_model_is_left_alone_in_train_mode():
    model = network("neck").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        fastcam.attribute_pair(model, pictures(2), pictures(2, 2))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weights_of_the_moment_are_used():
    model, a, b = network("linear"), pictures(2), pictures(2, 2)
    explainer = fastcam.PairExplainer(model)
    explainer(a, b)
    with torch.no_grad():
        model.linear.weight.mul_(torch.tensor([1.0, -2, 3, 0.5, 1]).unsqueeze(1))
    torch.testing.assert_close(explainer(a, b).maps_a, fastcam.attribute_pair(model, a, b).maps_a)


def test_zero_and_orthogonal_embeddings():
    class Given(nn.Module):
        def forward(self, images):
            return images.relu()

    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    a[1, 0, 1, 1] = 1
    b[0, 1, 2, 2] = 1
    b[1, 1, 2, 2] = 1
    result = fastcam.attribute_pair(Given().eval(), a, b, embedding="avg", size="layer")
    assert result.score.tolist() == [0, 0]
    assert result.extra["degenerate"].all()
    assert result.weights.tolist() == [[1, 1, 1]] * 2
    assert result.maps_a[0].count_nonzero() == 0
    assert result.maps_a.isfinite().all()


def test_empty_batches():
    model = network("mlp")
    nothing = pictures(0)
    result = fastcam.attribute_pair(model, nothing, nothing)
    assert result.maps_a.shape == (0, 24, 28)
    assert result.contributions.shape == (0, 5)
    explainer = fastcam.PairExplainer(model)
    assert explainer.cross(nothing, pictures(3)).maps_b.shape == (0, 3, 24, 28)
    assert explainer.cross(pictures(3), explainer.gallery(nothing)).maps_a.shape == (3, 0, 24, 28)


def test_nan_is_named_or_masked():
    model, a, b = network("linear"), pictures(3), pictures(3, 2)
    b[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"pair 1 .* second image"):
        fastcam.attribute_pair(model, a, b)
    result = fastcam.attribute_pair(model, a, b, on_nonfinite="mask")
    assert result.valid.tolist() == [True, False, True]
    assert result.maps_a[1].count_nonzero() == 0
    assert result.maps_b.isfinite().all()
    torch.testing.assert_close(result.maps_a[2:], fastcam.attribute_pair(model, a[2:], b[2:]).maps_a)


INVERSE = {"metric": "euclidean", "euclidean_term": "inverse"}
ERRORS = [
    ({"metric": "manhattan"}, ValueError, "metric must be one of 'cosine', 'euclidean'; got 'manhattan'"),
    ({"weighting": "softmax"}, ValueError, "weighting must be one of"),
    ({"metrik": "cosine"}, TypeError, "no option 'metrik'; did you mean 'metric'"),
    ({"metric": "euclidean", "weighting": "ratio"}, ValueError, "use weighting='minmax' or relu=False"),
    (
        {"metric": "euclidean", "euclidean_term": "inverse", "weighting": "raw", "dissimilarity": True},
        ValueError,
        "never",
    ),
    ({"gem_power": 0}, ValueError, "gem_power must be a positive number"),
    ({"relu": "no"}, TypeError, "relu must be True or False; got 'no'"),
    ({"dissimilarity": "yes"}, TypeError, "dissimilarity must be True or False; got 'yes'"),
    ({"normalize_embedding": 1}, TypeError, "normalize_embedding must be True or False; got 1"),
    ({"layer": "feature"}, ValueError, "has no layer 'feature'"),
    ({"method": "grad_cam"}, ValueError, "explains images one by one .* sfam"),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=[next(iter(e[0])) for e in ERRORS])
def test_errors_say_what_is_possible(options, error, message):
    with pytest.raises(error, match=message):
        fastcam.attribute_pair(network("linear"), pictures(1), pictures(1), **options)


def test_more_errors():
    model = network("linear")
    with pytest.raises(ValueError, match="2 and 3 images make no pairs"):
        fastcam.attribute_pair(model, pictures(2), pictures(3))
    with pytest.raises(ValueError, match=r"fastcam.attribute_pair\(model, a, b, 'sfam'\)"):
        fastcam.attribute(model, pictures(1), "sfam")
    with pytest.raises(ValueError, match=r"embedding='avg'"):
        fastcam.attribute_pair(model.features, pictures(1), pictures(1))
    explainer = fastcam.PairExplainer(model)
    with pytest.raises(ValueError, match="labels must be"):
        explainer.gallery(pictures(3), [1, 2])
    with pytest.raises(ValueError, match="one size"):
        explainer.gallery([pictures(1), pictures(1, size=32)])
    with pytest.raises(ValueError, match="holds layer"):
        fastcam.PairExplainer(model, layer="features.0")(pictures(1), explainer.gallery(pictures(1)))
    with pytest.raises(IndexError, match="rows must lie in"):
        explainer.against(pictures(1), pictures(2), torch.tensor([[2]]))
    with pytest.raises(TypeError, match="rows must be integers"):
        explainer.against(pictures(1), pictures(2), torch.tensor([[0.5]]))
    labelled = explainer.gallery(pictures(3), [0, 1, 1])
    with pytest.raises(ValueError, match=r"targets must be a label or \(2,\)"):
        explainer.prototypes(pictures(2), labelled, targets=[0, 1, 1])
    with pytest.raises(ValueError, match="empty"):
        explainer.prototypes(pictures(2), labelled[:0])
    with pytest.raises(ValueError, match="at least one chosen"):
        explainer.against(pictures(1), pictures(2), torch.tensor([[1]]), torch.tensor([[False]]))


def test_a_gallery_of_another_making_is_refused():
    model, a, b = network("linear"), pictures(2), pictures(3, 2)
    gallery = fastcam.PairExplainer(model).gallery(b)
    other = network("linear", seed=1)
    for explainer in (
        fastcam.PairExplainer(other),
        fastcam.PairExplainer(model, embedding="max"),
        fastcam.PairExplainer(model, precision="fp32"),
    ):
        with pytest.raises(ValueError, match="make it anew"):
            explainer(a[:1], gallery)
    assert len(gallery[1]) == len(gallery[torch.tensor(1)]) == len(gallery[-1]) == 1
    with torch.no_grad():
        model.linear.weight.mul_(3)
    with pytest.raises(ValueError, match="make it anew"):
        fastcam.PairExplainer(model)(a[:1], gallery)


def test_registry_tells_of_sfam():
    facts = fastcam.methods()["sfam"]
    assert facts["options"]["metric"] == "cosine"
    assert "reconstructed" in fastcam.attribute_pair(network("none"), pictures(1), pictures(1, 2)).options["certainty"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalised", [True, False])
def test_half_precision_embeddings(dtype, normalised):
    """512 numbers an embedding, whose lengths are nearly alike on noise: what is normalised is told in float64."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, *([Normalised()] if normalised else [])).eval()
    a, b = pictures(2).float(), pictures(2, seed=7).float()
    wanted = fastcam.attribute_pair(model, a, b)
    found = fastcam.attribute_pair(copy.deepcopy(model).to(dtype), a.to(dtype), b.to(dtype))
    assert nn.functional.cosine_similarity(found.maps_a.flatten(), wanted.maps_a.flatten(), dim=0) >= 0.999
    torch.testing.assert_close(found.score.float(), wanted.score.float(), rtol=0, atol=1e-2)


class Normalised(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x)
