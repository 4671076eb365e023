"""Explaining pairs: `attribute_pair` for a call, `PairExplainer` for many, `Gallery` for features kept between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcam._dtypes import accumulation_dtype
from fastcam._embedding_network import EmbeddingNetwork, Side, SideOfPair, integers
from fastcam.gallery import Gallery
from fastcam.methods._maps import Maps, finish
from fastcam.methods._method import Evidence, Shares
from fastcam.program.state import neutral_modes

__all__ = ["Gallery", "PairAttribution", "PairExplainer", "attribute_pair"]


@dataclass(frozen=True, eq=False)
class PairAttribution:
    """Maps of B pairs of images; where one image was held against N others, B stands for (B, N) below.

    maps_a, maps_b  (B, H, W) each, at its own images' size; in [0, 1] where normalised
    raw_a, raw_b    (B, h, w): the maps at layer size, after the ReLU, before normalisation
    contributions   (B, D) what each channel of the embedding contributes to the similarity (with the option
                    `dissimilarity`: to the difference)
    weights         (B, D) the channels' weights, the same for both images
    score           (B,) the similarity: cosine, or minus the squared distance
    valid           (B,) bool; False where a map was masked because something was not finite
    layer, method   names
    options         the method's options as used; "certainty" says what is reconstructed rather than known
    extra           "channel_weights_a", "channel_weights_b": (B, K), the weights pulled back to the feature maps;
                    "degenerate": (B,) bool, all channels contribute the same; more where a call says so

    All tensors are on the images' device and carry no gradient. Maps are float32, or float64 where the network runs in
    float64.
    """

    maps_a: Tensor
    maps_b: Tensor
    raw_a: Tensor
    raw_b: Tensor
    contributions: Tensor
    weights: Tensor
    score: Tensor
    valid: Tensor
    layer: str
    method: str
    options: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        shape = ", ".join(str(size) for size in self.maps_a.shape)
        return f"PairAttribution(method={self.method!r}, layer={self.layer!r}, maps_a=({shape}) {self.maps_a.dtype})"


class PairExplainer(EmbeddingNetwork):
    """A pair method bound to an embedding network; keeps capture, head analysis and converted weights between calls.

        explainer = fastcam.PairExplainer(model, "sfam", metric="cosine")
        result = explainer(images_a, images_b)           # result.maps_a, result.maps_b: (B, H, W) each
        gallery = explainer.gallery(many_images)         # runs the network once
        result = explainer.cross(query, gallery)         # result.maps_b: (1, N, H, W), no network run but the query's

    model    any module that maps an image batch (B, C, *spatial) to embeddings (B, D), or to a structure that holds
             them (the option `embedding` takes them from it)
    method   "sfam"
    options  the method's options; an unknown one is an error that lists the known ones

    The other arguments are those of `fastcam.Explainer`. Raises ValueError or TypeError as it does.
    Cost of a pair: two forward passes, a pass back through the head unless it is a global average pool with at most a
    linear layer behind it, and three fused ops. Norms are never differentiated: where the network ends in an L2
    normalisation, embeddings are taken from before it.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "sfam",
        *,
        layer: str | nn.Module | None = None,
        size: str | Sequence[int] = "input",
        normalize: bool = True,
        precision: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(
            model,
            method,
            options,
            layer=layer,
            size=size,
            normalize=normalize,
            precision=precision,
            channels_last=channels_last,
            compile=compile,
        )

    def __repr__(self) -> str:
        return f"PairExplainer({type(self.model).__name__}, {self.method.name!r}, layer={self.layer!r})"

    def __call__(self, a: Side, b: Side) -> PairAttribution:
        """Maps of the pairs (a[i], b[i]); either side may be a single image that goes with all of the other.

        a, b  images (B, C, *spatial), whose sizes may differ, or a `Gallery`
        """
        with neutral_modes():
            left, right = self._side(a), self._side(b)
            if len(left) == len(right):
                return self._paired(left, right)
            if 1 not in (len(left), len(right)):
                raise ValueError(
                    f"{len(left)} and {len(right)} images make no pairs: pass as many of each, one on either side, or "
                    "call .cross for all against all"
                )
            return _without_axis(self._crossed(left, right), 0 if len(left) == 1 else 1)

    def cross(self, a: Side, b: Side) -> PairAttribution:
        """Every image of `a` against every one of `b`: results of leading shape (A, B).

        Features are computed once for each image and read once for all of its maps.
        """
        with neutral_modes():
            return self._crossed(self._side(a), self._side(b))

    def against(
        self,
        images: Side,
        support: Side,
        rows: Tensor,
        chosen: Tensor | None = None,
    ) -> PairAttribution:
        """Each image against the mean of several support images: a prototype, or a set of neighbours.

        rows    (B, S) which of `support`
        chosen  (B, S) bool, which of these count; at least one for each image. Default: all

        Cosine: c_d = mean_j u_d m_jd over the chosen, all of length 1. Euclidean: the pair of u and the m_j's mean.
        maps_b is (B, S, H, W), the support images' maps by the same weights (zeros where not chosen).
        """
        with neutral_modes():
            left, right = self._side(images), self._side(support)
            rows = integers(rows, "rows", right.device)
            chosen = torch.ones_like(rows) if chosen is None else torch.as_tensor(chosen, device=right.device)
            chosen = chosen.bool()
            return self._among(left, right, rows, chosen, {})

    def neighbours(
        self, images: Side, gallery: Gallery, *, k_neighbors: int = 20, temperature: float = 0.07
    ) -> PairAttribution:
        """Each image against its nearest neighbours of the class they vote for.

        Each of the `k_neighbors` nearest by cosine votes for its label with weight exp(cos / temperature); those of the
        winning class are the set of `against`. `extra` has "neighbours" (B, k_neighbors) rows of the gallery, nearest
        first, "chosen" (B, k_neighbors), and "predicted" (B,).

        A smaller gallery gives all it has. Raises ValueError for a gallery without labels, or without images.
        """
        if not isinstance(gallery, Gallery) or gallery.labels is None:
            raise ValueError("neighbours vote by their labels; make the gallery with labels=")
        if isinstance(k_neighbors, bool) or not isinstance(k_neighbors, int) or k_neighbors < 1:
            raise ValueError(f"k_neighbors must be an integer from 1 on; got {k_neighbors!r}")
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive number; got {temperature!r}")
        with neutral_modes():
            left, right = self._side(images), self._side(gallery)
            if len(right) == 0:
                raise ValueError("the gallery is empty")
            wide = accumulation_dtype(left.embeddings.dtype)
            units = [nn.functional.normalize(one.embeddings.to(wide), eps=1e-12) for one in (left, right)]
            nearest = (units[0] @ units[1].T).topk(min(k_neighbors, len(right)), dim=1)
            labels = gallery.labels.to(nearest.indices.device)[nearest.indices]
            # Votes relative to the nearest neighbour's: exp(1 / temperature) overflows for small temperatures.
            votes = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
            same = labels.unsqueeze(2) == labels.unsqueeze(1)
            winner = (same * votes.unsqueeze(1)).sum(2).argmax(1, keepdim=True)
            predicted = labels.gather(1, winner)
            extra = {"neighbours": nearest.indices, "predicted": predicted.squeeze(1)}
            return self._among(left, right, nearest.indices, labels == predicted, extra)

    def prototypes(self, images: Side, gallery: Gallery, targets: Tensor | int | None = None) -> PairAttribution:
        """Each image against the prototype of a class: the support images of the gallery with that label.

        targets  labels (B,) or one for all; None: the class whose prototype (mean embedding) is most similar by the
                 method's metric

        `extra` has "support" (B, S) rows of the gallery, "chosen" (B, S) and "predicted" (B,) labels.
        Raises ValueError for a gallery without labels, or a label it does not hold.
        """
        if not isinstance(gallery, Gallery) or gallery.labels is None:
            raise ValueError("prototypes are means over a label's images; make the gallery with labels=")
        with neutral_modes():
            left, right = self._side(images), self._side(gallery)
            if len(right) == 0:
                raise ValueError("the gallery is empty")
            known, member = torch.unique(gallery.labels.to(right.device), return_inverse=True)
            if targets is None:
                place = self._nearest_prototype(left, right, member, len(known))
            else:
                wanted = integers(targets, "targets", right.device)
                if tuple(wanted.shape) not in ((), (len(left),)):
                    raise ValueError(f"targets must be a label or ({len(left)},) labels; got {tuple(wanted.shape)}")
                wanted = wanted.expand(len(left))
                found = wanted.unsqueeze(1) == known
                if not bool(found.any(1).all()):
                    missing = int(wanted[~found.any(1)][0])
                    raise ValueError(f"the gallery has no image of label {missing}; it has {known.tolist()[:20]}")
                place = found.to(torch.uint8).argmax(1)
            most = int(torch.bincount(member).max())
            order = torch.argsort(member, stable=True)
            counts = torch.bincount(member, minlength=len(known))
            starts = counts.cumsum(0) - counts
            offset = torch.arange(most, device=right.device)
            chosen = offset < counts[place].unsqueeze(1)
            rows = order[(starts[place].unsqueeze(1) + offset).clamp(max=len(order) - 1)]
            extra = {"support": rows, "predicted": known[place]}
            return self._among(left, right, rows, chosen, extra)

    # ---- pairs ----

    def _paired(self, left: SideOfPair, right: SideOfPair) -> PairAttribution:
        shares = self._shares(left, right)
        channels = [self._channels(side, shares.weights) for side in (left, right)]
        maps = [self._maps(side, weights) for side, weights in zip((left, right), channels, strict=True)]
        return self._result(left, shares, channels, maps)

    def _crossed(self, left: SideOfPair, right: SideOfPair) -> PairAttribution:
        rows = [self._shares(left[i], right) for i in range(len(left))] or [self._shares(left, right[:0])]
        shares = Shares(*(torch.stack(part) for part in zip(*(dataclasses.astuple(row) for row in rows), strict=True)))
        if len(left) == 0:
            shares = Shares(*(part.new_zeros((0, len(right), *part.shape[2:])) for part in dataclasses.astuple(shares)))
        a, b = len(left), len(right)
        index = torch.arange(max(a, b), device=shares.weights.device)
        forth, back = shares.weights, shares.weights.transpose(0, 1)
        channels = [
            self._channels(left, forth.flatten(0, 1), index[:a].repeat_interleave(b)).unflatten(0, (a, b)),
            self._channels(right, back.flatten(0, 1), index[:b].repeat_interleave(a)).unflatten(0, (b, a)),
        ]
        first = self._maps(left, channels[0])
        second = tuple(part.transpose(0, 1) for part in self._maps(right, channels[1]))
        return self._result(left, shares, [channels[0], channels[1].transpose(0, 1)], [first, second])

    def _nearest_prototype(self, left: SideOfPair, right: SideOfPair, member: Tensor, classes: int) -> Tensor:
        """(B,) the class whose mean embedding is most similar; `member` (N,) is each support image's class."""
        unit = self.options.metric == "cosine" or self._length(left) is not None
        wide = accumulation_dtype(right.embeddings.dtype)
        u, m = (one.embeddings.to(wide) for one in (left, right))
        if unit:
            u, m = (nn.functional.normalize(one, eps=1e-12) for one in (u, m))
        hot = nn.functional.one_hot(member, classes).to(wide)
        middle = (hot / hot.sum(0)).T @ m
        return (u @ middle.T if self.options.metric == "cosine" else -torch.cdist(u, middle)).argmax(1)

    def _among(
        self, left: SideOfPair, right: SideOfPair, rows: Tensor, chosen: Tensor, extra: dict[str, Tensor]
    ) -> PairAttribution:
        if rows.ndim != 2 or len(rows) != len(left) or chosen.shape != rows.shape:
            raise ValueError(
                f"rows and chosen must be ({len(left)}, S); got {tuple(rows.shape)} and {tuple(chosen.shape)}"
            )
        if rows.numel() and (rows.amin() < 0 or rows.amax() >= len(right)):
            raise IndexError(f"rows must lie in 0 to {len(right) - 1}, the support's images")
        if not bool(chosen.any(1).all()):
            raise ValueError("each image needs at least one chosen support image")
        shares = self.method.among(left.embeddings, right.embeddings[rows], chosen, self.options, self._length(left))
        flat = rows.flatten()
        ours = self._channels(left, shares.weights)
        theirs = self._channels(right, shares.weights.repeat_interleave(rows.shape[1], 0), flat)
        first = self._maps(left, ours)
        found = self._maps(right[flat], theirs)
        second = tuple(part.unflatten(0, rows.shape) for part in found)
        second = (_masked(second[0], chosen), _masked(second[1], chosen), second[2] | ~chosen)
        weights = theirs.unflatten(0, rows.shape)
        result = self._result(left, shares, [ours, weights], [first, second])
        return dataclasses.replace(result, extra=result.extra | extra | {"chosen": chosen})

    def _length(self, left: SideOfPair) -> float | None:
        """What embeddings are brought to before they are compared, or None."""
        given = self.options.normalize_embedding
        return left.length if given is None or (given and left.length) else 1.0 if given else None

    def _shares(self, left: SideOfPair, right: SideOfPair) -> Shares:
        if left.embeddings.shape[1] != right.embeddings.shape[1]:
            raise ValueError(
                f"the two sides have embeddings of {left.embeddings.shape[1]} and {right.embeddings.shape[1]} channels"
            )
        return self.method.shares(left.embeddings, right.embeddings, self.options, self._length(left))

    def _maps(self, side: SideOfPair, weights: Tensor) -> Maps:
        """Maps, raw maps and whether each is finite, of weights (B[, T], K)."""
        features = self._reshaped(side.features, side.session)
        size = self._map_size(side.image[1:], features, side.session.layer)
        return finish(features, Evidence(weights=weights), self.options.relu, self.normalize, size)

    def _result(
        self, left: SideOfPair, shares: Shares, channels: Sequence[Tensor], maps: Sequence[Maps]
    ) -> PairAttribution:
        (maps_a, raw_a, finite_a), (maps_b, raw_b, finite_b) = maps
        finite = [one if one.ndim == shares.score.ndim else one.all(-1) for one in (finite_a, finite_b)]
        valid = finite[0] & finite[1] & shares.score.isfinite()
        behaviour = self.options.on_nonfinite or ("raise" if maps_a.device.type == "cpu" else "mask")
        if behaviour == "raise" and not bool(valid.all()):
            raise ValueError(self._complaint(valid, finite, left.session.layer))
        if behaviour == "mask":
            maps_a, raw_a, maps_b, raw_b = (_masked(one, valid) for one in (maps_a, raw_a, maps_b, raw_b))
        constant = shares.contributions.amax(-1) == shares.contributions.amin(-1)
        options = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options) if f.init}
        certainty = {"certainty": self.method.certainty} if self.method.certainty else {}
        return PairAttribution(
            maps_a=maps_a,
            maps_b=maps_b,
            raw_a=raw_a,
            raw_b=raw_b,
            contributions=shares.contributions,
            weights=shares.weights,
            score=shares.score,
            valid=valid,
            layer=left.session.layer,
            method=self.method.name,
            options=options | certainty,
            extra={"channel_weights_a": channels[0], "channel_weights_b": channels[1], "degenerate": constant},
        )

    def _complaint(self, valid: Tensor, finite: Sequence[Tensor], layer: str) -> str:
        pair = tuple((~valid).nonzero()[0].tolist())
        place = pair[0] if len(pair) == 1 else pair
        sides = [name for name, one in zip(("first", "second"), finite, strict=True) if not bool(one[pair])]
        where = f"of its {' and '.join(sides)} image" if sides else "of its embeddings"
        return (
            f"the {self.method.name} map at layer '{layer}' is not finite for pair {place} ({int((~valid).sum())} of "
            f"{valid.numel()} pairs affected), because {where} something is NaN, infinite or overflows; check images "
            "and weights, or pass on_nonfinite='mask' to get zeros there"
        )


def attribute_pair(
    model: nn.Module,
    images_a: Side,
    images_b: Side,
    method: str = "sfam",
    *,
    layer: str | nn.Module | None = None,
    size: str | Sequence[int] = "input",
    normalize: bool = True,
    **options: Any,
) -> PairAttribution:
    """Why two images are similar to an embedding network: maps of both, and what each channel contributes.

        result = fastcam.attribute_pair(model, images_a, images_b, "sfam", metric="cosine")   # result.maps_a: (B, H, W)

    model     maps an image batch (B, C, *spatial) to embeddings (B, D)
    images_a  (B, C, *spatial), prepared as the model expects; a single image goes with all of the other side
    images_b  likewise; its size may differ
    options   those of the method: `fastcam.methods()["sfam"]`

    The other arguments are those of `PairExplainer`, whose docstring gives errors and cost and which compares one image
    with many, or with prototypes; this is `PairExplainer(model, method, ...)(images_a, images_b)`.
    """
    settings: dict[str, Any] = {"layer": layer, "size": size, "normalize": normalize}
    return PairExplainer(model, method, **settings, **options)(images_a, images_b)


def _masked(maps: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid.reshape(*valid.shape, *(1,) * (maps.ndim - valid.ndim)), maps, maps.new_zeros(()))


def _without_axis(result: PairAttribution, axis: int) -> PairAttribution:
    """The result of one image against many without the one's axis."""
    names = ("maps_a", "maps_b", "raw_a", "raw_b", "contributions", "weights", "score", "valid")
    parts = {name: getattr(result, name).squeeze(axis) for name in names}
    extra = {name: value.squeeze(axis) for name, value in result.extra.items()}
    return dataclasses.replace(result, **parts, extra=extra)
