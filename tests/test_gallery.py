"""Galleries of features computed before, galleries in files, and embeddings inside structured outputs."""

from __future__ import annotations

import dataclasses
import operator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam import _weights_hash
from fastcam.program.capture import capture

torch.set_num_threads(1)


class Embedder(nn.Module):
    def __init__(self, unit: bool = False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 7, 3, 2, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5))
        self.unit = unit

    def forward(self, images):
        z = self.project(self.body(images).mean((2, 3)))
        return functional.normalize(z) if self.unit else z


class Found(NamedTuple):
    embedding: torch.Tensor
    maps: torch.Tensor


class Structured(Embedder):
    def __init__(self, form, unit: bool = False):
        super().__init__(unit)
        self.form = form
        self.classes = nn.Linear(5, 4)

    def forward(self, images):
        features = self.body(images)
        z = self.project(features.mean((2, 3)))
        z = functional.normalize(z) if self.unit else z
        return self.form(z, features, self.classes(z))


FORMS = {
    "dict": (lambda z, f, c: {"logits": c, "embedding": z, "maps": f}, operator.itemgetter("embedding")),
    "tuple": (lambda z, f, c: (c, z), lambda output: output[1]),
    "named": (lambda z, f, c: Found(z, f), lambda output: output.embedding),
    "nested": (lambda z, f, c: {"all": [c, {"z": z}]}, lambda output: output["all"][1]["z"]),
}


def network(kind=Embedder, *given) -> nn.Module:
    torch.manual_seed(0)
    return kind(*given).double().eval()


def pictures(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((count, 3, 20, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(one: fastcam.PairAttribution, other: fastcam.PairAttribution) -> None:
    for field in ("maps_a", "maps_b", "raw_a", "raw_b", "contributions", "weights", "score"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), msg=lambda m, f=field: f"{f}: {m}")
    for name, value in other.extra.items():
        torch.testing.assert_close(one.extra[name], value)


def alike(one: fastcam.Gallery, other: fastcam.Gallery) -> None:
    for field in dataclasses.fields(fastcam.Gallery)[:-1]:  # features computed elsewhere are of unknown weights
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


# ---- features computed before ----


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean"}, {"embedding": "gem"}], ids=str)
@pytest.mark.parametrize("unit", [False, True])
def test_stored_features_make_the_gallery_of_their_images(unit, options):
    model, a, b = network(Embedder, unit), pictures(2), pictures(5, 2)
    explainer = fastcam.PairExplainer(model, **options)
    wanted = explainer.gallery(b, range(5))
    with torch.no_grad():
        features = model.body(b)
    found = explainer.gallery_of_features(features, (3, 20, 24), range(5), chunk=2)
    alike(found, wanted)
    alike(explainer.gallery_of_features(iter([features[:3], features[3:]]), a.shape[1:], range(5)), wanted)
    same(explainer.cross(a, found), explainer.cross(a, wanted))
    same(explainer.prototypes(a, found), explainer.prototypes(a, wanted))


def test_stored_features_do_not_run_the_body():
    model = network()
    explainer = fastcam.PairExplainer(model)
    explainer.gallery(pictures(1))
    with torch.no_grad():
        features = model.body(pictures(3))
        model.body[0].weight.fill_(torch.nan)
    gallery = explainer.gallery_of_features(features, (3, 20, 24))
    torch.testing.assert_close(gallery.embeddings, model.project(features.mean((2, 3))).detach())


def test_features_in_arrays(tmp_path):
    explainer = fastcam.PairExplainer(network())
    features = torch.rand((5, 7, 5, 6), dtype=torch.float64)
    wanted = explainer.gallery_of_features(features, (3, 20, 24))
    np.save(tmp_path / "features.npy", features.numpy())
    stored = np.load(tmp_path / "features.npy", mmap_mode="r")
    for given in (stored, [stored[:2], features[2:]]):
        alike(explainer.gallery_of_features(given, (3, 20, 24), chunk=2), wanted)
    for wrong in (features.tolist(), 3, "features"):
        with pytest.raises(TypeError, match=r"features must be a tensor, an array, or batches of them; got"):
            explainer.gallery_of_features(wrong, (3, 20, 24))


@pytest.mark.parametrize("embedding", [None, "avg"])
def test_galleries_of_other_weights_before_the_layer_are_refused(embedding, tmp_path):
    """The embeddings still follow from the features; what a head has become counts only where it makes embeddings."""
    model, a = network(), pictures(2)
    options = {} if embedding is None else {"embedding": embedding, "layer": "body"}
    explainer = fastcam.PairExplainer(model, **options)
    gallery, given = (
        explainer.gallery(pictures(3, 2)),
        explainer.gallery_of_features(model.body(pictures(3)), (3, 20, 24)),
    )
    assert given.weights is None
    assert "unknown weights" in repr(given)
    gallery[1:].save(tmp_path / "gallery.pt")
    gallery = fastcam.Gallery.load(tmp_path / "gallery.pt")
    wanted = explainer.cross(a, gallery)
    same(fastcam.PairExplainer(model, channels_last=True, **options).cross(a, gallery), wanted)
    with torch.no_grad():
        model.project[2].weight.mul_(1.5)
    if embedding:
        same(explainer.cross(a, gallery), wanted)
    with torch.no_grad():
        model.project[2].weight.div_(1.5)
        kept, model.body[0].bias = model.body[0].bias, nn.Parameter(model.body[0].bias + 1e-9)
    for one in (explainer, fastcam.PairExplainer(model, **options)):
        with pytest.raises(ValueError, match=rf"other weights \({gallery.weights}\) than .* up to layer 'body.*anew"):
            one.cross(a, gallery)
        one.cross(a, given)
    model.body[0].bias = kept
    same(explainer.cross(a, gallery), wanted)


def test_weights_are_hashed_once_for_each_state(monkeypatch):
    model, a, hashed = network(), pictures(2), []
    monkeypatch.setattr(_weights_hash, "tensors_hash", lambda tensors: hashed.append(len(tensors)) or "hash")
    explainer, earlier = fastcam.PairExplainer(model), fastcam.PairExplainer(model, layer="body.0", embedding="avg")
    gallery, shallow = explainer.gallery(pictures(3, 2)), earlier.gallery(pictures(3, 2))
    noted = []
    monkeypatch.setattr(_weights_hash, "StorageWeakRef", noted.append)
    for _ in range(2):
        fastcam.PairExplainer(model).cross(a, gallery)
        earlier.cross(a, shallow)
    assert hashed == [4, 2]  # of two convolutions and of one
    assert noted == []  # where nothing has changed, nothing is noted either
    with torch.no_grad():
        model.body[2].weight.add_(1)
    explainer.cross(a, gallery)
    earlier.cross(a, shallow)
    assert hashed == [4, 2, 4]


def test_features_stored_in_half_precision_and_none():
    model, a, b = network().float(), pictures(2).float(), pictures(4, 2).float()
    explainer = fastcam.PairExplainer(model)
    with torch.no_grad():
        half = model.body(b).half()
    gallery = explainer.gallery_of_features(half, (3, 20, 24))
    assert torch.equal(gallery.features, half.float())
    wanted = explainer.cross(a, b)
    torch.testing.assert_close(explainer.cross(a, gallery).score, wanted.score, rtol=1e-3, atol=1e-3)
    assert len(explainer.gallery_of_features(half[:0], (3, 20, 24))) == 0


def test_what_cannot_be_a_gallery_says_so():
    explainer = fastcam.PairExplainer(network())
    features = torch.zeros(2, 7, 5, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"for images \(3, 40, 24\) are \(B, 7, 10, 6\); got \(2, 7, 5, 6\)"):
        explainer.gallery_of_features(features, (3, 40, 24))
    with pytest.raises(ValueError, match=r"labels must be \(2,\)"):
        explainer.gallery_of_features(features, (3, 20, 24), [1, 2, 3])
    with pytest.raises(ValueError, match="at least one batch of features"):
        explainer.gallery_of_features([], (3, 20, 24))
    with pytest.raises(ValueError, match="at least one batch of images"):
        explainer.gallery([])
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        explainer.gallery(pictures(2), chunk=0)

    class Around(Embedder):
        def forward(self, images):
            return self.project(self.body(images).mean((2, 3))) + images.mean((1, 2, 3)).unsqueeze(1)

    with pytest.raises(ValueError, match="one for one only"):
        fastcam.PairExplainer(network(Around), layer="body").gallery_of_features(features, (3, 20, 24))


@pytest.mark.parametrize("labels", [["cat", "dog"], [0.5, 1.0], [True, False]], ids=str)
def test_labels_are_integers(labels):
    explainer = fastcam.PairExplainer(network())
    with pytest.raises(TypeError, match="labels must be integers; got"):
        explainer.gallery(pictures(2), labels)
    gallery = explainer.gallery(pictures(2), [0, 1])
    with pytest.raises(TypeError, match="targets must be integers; got"):
        explainer.prototypes(pictures(2), gallery, targets=labels)


# ---- in files ----


def test_a_gallery_in_a_file(tmp_path):
    model, a = network(Embedder, True), pictures(2)
    explainer = fastcam.PairExplainer(model)
    gallery = explainer.gallery(pictures(6, 2), [4, 4, 7, 7, 7, 4])
    gallery.save(tmp_path / "all.pt")
    found = fastcam.Gallery.load(tmp_path / "all.pt")
    alike(found, gallery)
    same(explainer.neighbours(a, found, k_neighbors=3), explainer.neighbours(a, gallery, k_neighbors=3))
    part = gallery[1:3]
    part.save(tmp_path / "part.pt")
    alike(fastcam.Gallery.load(tmp_path / "part.pt"), part)
    assert (tmp_path / "part.pt").stat().st_size < 0.7 * (tmp_path / "all.pt").stat().st_size
    with torch.no_grad():
        model.project[2].weight.mul_(1.5)
    with pytest.raises(ValueError, match="make it anew"):
        fastcam.PairExplainer(model)(a[:1], fastcam.Gallery.load(tmp_path / "all.pt"))


def test_a_file_that_is_no_gallery(tmp_path):
    torch.save({"features": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt is no gallery"):
        fastcam.Gallery.load(tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"no file of torch")
    with pytest.raises(ValueError, match=r"broken.pt is damaged or no gallery"):
        fastcam.Gallery.load(tmp_path / "broken.pt")
    with pytest.raises(FileNotFoundError):
        fastcam.Gallery.load(tmp_path / "none.pt")


# ---- embeddings inside an output ----


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("form", list(FORMS))
def test_embeddings_are_taken_from_a_structured_output(form, unit):
    """As of the network that returns the embedding alone: a normalisation is looked behind, galleries work."""
    make, pick = FORMS[form]
    model = network(Structured, make, unit)
    plain = network(Embedder, unit)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("classes")})
    a, b = pictures(2), pictures(3, 2)
    for options in ({}, {"metric": "euclidean"}):
        explainer = fastcam.PairExplainer(model, embedding=pick, **options)
        wanted = fastcam.PairExplainer(plain, **options).cross(a, b)
        same(explainer.cross(a, explainer.gallery(b)), wanted)
        with torch.no_grad():
            same(explainer.cross(a, explainer.gallery_of_features(model.body(b), (3, 20, 24))), wanted)
    assert len(capture(model, a).picked) == 1  # kept from call to call


def test_a_structured_output_through_a_hook():
    class Branching(Structured):
        def forward(self, images):
            return super().forward(images if images.sum() < 1e9 else -images)

    make, pick = FORMS["dict"]
    model = network(Branching, make)
    plain = network(Embedder)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("classes")})
    a, b = pictures(2), pictures(2, 2)
    same(
        fastcam.attribute_pair(model, a, b, layer="body", embedding=pick),
        fastcam.attribute_pair(plain, a, b, layer="body"),
    )


def test_a_structured_output_needs_to_be_told_from():
    model, a = network(Structured, FORMS["dict"][0]), pictures(2)
    holds = r"dict with output\['logits'\] \(2, 4\), output\['embedding'\] \(2, 5\), output\['maps'\] \(2, 7, 5, 6\)"
    with pytest.raises(TypeError, match=rf"returns {holds}\. Pass embedding=lambda output"):
        fastcam.attribute_pair(model, a, a)
    for wrong in (lambda output: output["embeding"], lambda output: output["maps"].mean((2, 3)), lambda output: output):
        with pytest.raises(TypeError, match=r"take one tensor .* returns dict with .*\(B, 7, 5, 6\).* wrap the model"):
            fastcam.attribute_pair(model, a, a, embedding=wrong)
    with pytest.raises(ValueError, match=r"this model's output is \(2, 7, 5, 6\)"):
        fastcam.attribute_pair(model, a, a, embedding=operator.itemgetter("maps"))
    with pytest.raises(ValueError, match=r"embedding must be one of .* or a callable; got 'cls'"):
        fastcam.attribute_pair(model, a, a, embedding="cls")
