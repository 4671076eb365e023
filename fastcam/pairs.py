"""Explaining pairs: `attribute_pair` for a call, `PairExplainer` for many, `Gallery` for features kept between them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastcam._dtypes import accumulation_dtype
from fastcam._network import Network, check_images, warn_if_training
from fastcam.methods import pair
from fastcam.methods._maps import Maps, finish
from fastcam.methods._method import Evidence, Shares
from fastcam.program.capture import Program
from fastcam.program.embedding import unnormalised
from fastcam.program.execute import Weights
from fastcam.program.forward import Forward, Session
from fastcam.program.hooks import HookSession
from fastcam.program.layers import check_spatial
from fastcam.program.session import CapturedSession
from fastcam.program.state import neutral_modes
from fastcam.program.targets import Targets

#: Features are no smaller than this where a power is taken of them.
_SMALLEST = 1e-6

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


@dataclass(frozen=True, eq=False)
class Gallery:
    """Features and embeddings of N images, so that their network need not run again.

    features    (N, K, *spatial) of the layer, as the network gives them
    embeddings  (N, D)
    labels      (N,) integers, or None
    image       an image's own (C, *spatial)
    layer       name of the layer
    length      that the network brings its embeddings to in the end, or None (these are from before that)
    """

    features: Tensor
    embeddings: Tensor
    labels: Tensor | None
    image: tuple[int, ...]
    layer: str
    length: float | None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Any) -> Gallery:
        """The images of `rows`: a slice, integers or a mask."""
        with contextlib.suppress(TypeError):
            rows = [operator.index(rows)]
        labels = None if self.labels is None else self.labels[rows]
        return dataclasses.replace(self, features=self.features[rows], embeddings=self.embeddings[rows], labels=labels)


_ONE_FOR_ONE = (
    "this network at layer '{layer}' explains pairs of images one for one only; for galleries and all against all it "
    "has to be captured, with nothing around the layer"
)
#: What a side of a comparison may be given as.
Side: TypeAlias = Tensor | Gallery


class PairExplainer(Network):
    """A pair method bound to an embedding network; keeps capture, head analysis and converted weights between calls.

        explainer = fastcam.PairExplainer(model, "sfam", metric="cosine")
        result = explainer(images_a, images_b)           # result.maps_a, result.maps_b: (B, H, W) each
        gallery = explainer.gallery(many_images)         # runs the network once
        result = explainer.cross(query, gallery)         # result.maps_b: (1, N, H, W), no network run but the query's

    model    any module that maps an image batch (B, C, *spatial) to embeddings (B, D)
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
            layer=layer,
            size=size,
            normalize=normalize,
            precision=precision,
            channels_last=channels_last,
            compile=compile,
        )
        self.method = pair(method)
        self.options = self.method.make_options(options)

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
            rows = torch.as_tensor(rows, device=right.device)
            if rows.dtype.is_floating_point or rows.dtype == torch.bool:
                raise TypeError(f"rows must hold integers, places in the support; got {rows.dtype}")
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
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive; got {temperature}")
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
                wanted = torch.as_tensor(targets, device=right.device)
                if wanted.dtype.is_floating_point or tuple(wanted.shape) not in ((), (len(left),)):
                    raise ValueError(
                        f"targets must be a label or ({len(left)},) labels; got {wanted.dtype} {tuple(wanted.shape)}"
                    )
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

    def gallery(
        self, images: Tensor | Iterable[Tensor], labels: Tensor | Sequence[int] | None = None, *, chunk: int = 32
    ) -> Gallery:
        """Features and embeddings of images (N, C, *spatial), or of batches of them, run `chunk` at a time."""
        batches = [images] if isinstance(images, Tensor) else list(images)
        if not batches:
            raise ValueError("a gallery needs at least one batch of images")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {chunk}")
        with neutral_modes():
            parts = [self._side(part) for batch in batches for part in batch.split(chunk)]
        if len({part.image for part in parts}) > 1:
            raise ValueError("the images of a gallery must have one size; make one gallery for each")
        features = torch.cat([part.features for part in parts])
        embeddings = torch.cat([part.embeddings for part in parts])
        given = None if labels is None else torch.as_tensor(labels)
        if given is not None and tuple(given.shape) != (len(features),):
            raise ValueError(f"labels must be ({len(features)},), one for each image; got {tuple(given.shape)}")
        first = parts[0]
        return Gallery(features, embeddings, given, first.image, first.session.layer, first.length)

    # ---- one side ----

    def _side(self, given: Side) -> _Side:
        if isinstance(given, Gallery):
            parameter = next((p for p in self.model.parameters() if p.is_floating_point()), given.features)
            session, length = self._session(given.features.new_zeros((1, *given.image), dtype=parameter.dtype))
            if session.layer != given.layer:
                raise ValueError(f"the gallery holds layer '{given.layer}', this explainer reads '{session.layer}'")
            self._check_origin(given, session)
            return _Side(session, given.features, given.embeddings, given.image, length)
        check_images(given)
        warn_if_training(self.model)
        images = given.clone() if given.is_inference() else given
        if len(images) == 0:
            one = self._side(images.new_zeros((1, *images.shape[1:])))
            return dataclasses.replace(one, features=one.features[:0], embeddings=one.embeddings[:0], passed=None)
        session, length = self._session(images)
        # Features that say nothing alone have to keep their pass.
        lone = not isinstance(session, CapturedSession) or bool(session.cut.bypass)
        lone = lone and self.options.embedding == "output"
        passed = session.forward(images, "gradients" if lone else "closed_form", by_index=False)
        features = self._reshaped(passed.features)
        check_spatial((None, *features.shape[1:]), passed.layer, images.ndim - 2, self._reshapes)
        embeddings = self._embedded(passed.output, features)
        if isinstance(session, HookSession) and lone:
            _refuse_unit_rows(embeddings, session.reason)
        image = tuple(images.shape[1:])
        return _Side(session, passed.features, embeddings, image, length, passed if lone else None)

    def _session(self, images: Tensor) -> tuple[Session, float | None]:
        """The network at the layer, and the length it brings its embeddings to, where it does."""
        length = None

        def rewrite(program: Program) -> Program:
            nonlocal length
            if self.options.embedding != "output":
                return program
            found = program.embedding or unnormalised(program, Weights(program, self.model).values())
            length = found.length
            return found.program

        session = self._network_at(images, self.method.name, self.options, "closed_form", rewrite=rewrite)
        return session, length

    def _check_origin(self, gallery: Gallery, session: Session) -> None:
        """That the gallery's embeddings are what this network makes of its features."""
        if not isinstance(session, CapturedSession) or session.cut.bypass or len(gallery) == 0:
            return
        features, found = gallery.features[:1], gallery.embeddings[:1]
        if features.dtype == session.bound.dtype:
            with neutral_modes():
                output = session.cut.run_probe(features, session.leaves)
            expected = self._embedded(output, self._reshaped(features))
            scale = expected.abs().max()
            if expected.shape == found.shape and bool((expected.float() - found.float()).abs().max() <= 2e-2 * scale):
                return
        raise ValueError(
            f"the gallery's embeddings, {found.dtype} with {found.shape[1]} channels, are not what this explainer "
            "makes of its features: it was made by another model, with other weights, another pooling or precision; "
            "make it anew with explainer.gallery(images)"
        )

    @property
    def _reshapes(self) -> bool:
        return self.options.reshape_transform is not None

    def _reshaped(self, features: Tensor) -> Tensor:
        transform = self.options.reshape_transform
        return features if transform is None else transform(features)

    def _embedded(self, output: Any, features: Tensor) -> Tensor:
        """(B, D) embeddings by `options.embedding`."""
        options = self.options
        if options.embedding != "output":
            return _pooled(features, options.embedding, options.gem_power)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"'{self.method.name}' compares embeddings, a tensor (B, D); this model returns "
                f"{type(output).__name__}. Pass embedding='avg' for the layer's pooled features, or wrap the model"
            )
        if output.ndim != 2:
            raise ValueError(
                f"'{self.method.name}' compares embeddings (B, D); this model's output is {tuple(output.shape)}: pass "
                "embedding='avg' ('max', 'gem') for the layer's pooled features"
            )
        return output

    def _channels(self, side: _Side, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """(R, K): weights (R, D) of the embedding's channels, pulled back to feature channels, of `rows`."""
        options = self.options
        if options.embedding in ("avg", "max"):
            return weights
        if options.embedding == "gem":
            # d z_k / d A = A^(p - 1) z_k^(1 - p) / Z, summed over positions
            features = self._reshaped(side.features).to(weights.dtype).clamp(min=_SMALLEST).flatten(2)
            power = options.gem_power - 1
            factor = features.pow(power).mean(2) / side.embeddings.to(weights.dtype).pow(power)
            return weights * (factor if rows is None else factor[rows])

        def summed(gradients: Tensor) -> Tensor:
            return _summed(self._reshaped(gradients), weights.dtype)

        if side.passed is not None:
            if rows is not None and not torch.equal(rows, torch.arange(len(side), device=rows.device)):
                raise ValueError(_ONE_FOR_ONE.format(layer=side.session.layer))
            score = Targets(None, lambda output: (output * weights).sum(1))
            found = side.passed.gradients(score)
        elif not isinstance(side.session, CapturedSession):
            if len(weights) > 0:
                raise ValueError(_ONE_FOR_ONE.format(layer=side.session.layer))
            return weights.new_zeros((0, self._reshaped(side.features).shape[1]))
        else:
            rows = torch.arange(len(side), device=weights.device) if rows is None else rows
            return side.session.pull_back(side.features, weights, rows, summed)
        return summed(found)

    # ---- pairs ----

    def _paired(self, left: _Side, right: _Side) -> PairAttribution:
        shares = self._shares(left, right)
        channels = [self._channels(side, shares.weights) for side in (left, right)]
        maps = [self._maps(side, weights) for side, weights in zip((left, right), channels, strict=True)]
        return self._result(left, shares, channels, maps)

    def _crossed(self, left: _Side, right: _Side) -> PairAttribution:
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

    def _nearest_prototype(self, left: _Side, right: _Side, member: Tensor, classes: int) -> Tensor:
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
        self, left: _Side, right: _Side, rows: Tensor, chosen: Tensor, extra: dict[str, Tensor]
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

    def _length(self, left: _Side) -> float | None:
        """What embeddings are brought to before they are compared, or None."""
        given = self.options.normalize_embedding
        return left.length if given is None or (given and left.length) else 1.0 if given else None

    def _shares(self, left: _Side, right: _Side) -> Shares:
        if left.embeddings.shape[1] != right.embeddings.shape[1]:
            raise ValueError(
                f"the two sides have embeddings of {left.embeddings.shape[1]} and {right.embeddings.shape[1]} channels"
            )
        return self.method.shares(left.embeddings, right.embeddings, self.options, self._length(left))

    def _maps(self, side: _Side, weights: Tensor) -> Maps:
        """Maps, raw maps and whether each is finite, of weights (B[, T], K)."""
        features = self._reshaped(side.features)
        size = self._map_size(side.image[1:], features, side.session.layer)
        return finish(features, Evidence(weights=weights), self.options.relu, self.normalize, size)

    def _result(self, left: _Side, shares: Shares, channels: Sequence[Tensor], maps: Sequence[Maps]) -> PairAttribution:
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


@dataclass(frozen=True, eq=False)
class _Side:
    """Images of one side after their pass.

    features    as the layer gives them
    embeddings  (B, D), before a final normalisation
    image       (C, *spatial)
    passed      the pass, where the features alone do not do for pulling back
    """

    session: Session
    features: Tensor
    embeddings: Tensor
    image: tuple[int, ...]
    length: float | None
    passed: Forward | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def device(self) -> torch.device:
        return self.features.device

    def __getitem__(self, rows: Any) -> _Side:
        """The images of `rows`; they cannot be pulled back through a pass that was kept."""
        rows = slice(rows, rows + 1) if isinstance(rows, int) else rows
        return dataclasses.replace(self, features=self.features[rows], embeddings=self.embeddings[rows])


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


def _pooled(features: Tensor, kind: str, power: float) -> Tensor:
    """(B, K) in the accumulation dtype."""
    wide = features.to(accumulation_dtype(features.dtype)).flatten(2)
    if kind == "avg":
        return wide.mean(2)
    return wide.amax(2) if kind == "max" else wide.clamp(min=_SMALLEST).pow(power).mean(2).pow(1 / power)


def _summed(gradients: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, K, *spatial) -> (R, K), without a pass over positions that are all the same."""
    if all(gradients.stride(d) == 0 or gradients.shape[d] == 1 for d in range(2, gradients.ndim)):
        first = gradients
        while first.ndim > 2:
            first = first.select(2, 0)
        return first.to(dtype) * math.prod(gradients.shape[2:])
    return gradients.flatten(2).sum(2, dtype=dtype)


def _masked(maps: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid.reshape(*valid.shape, *(1,) * (maps.ndim - valid.ndim)), maps, maps.new_zeros(()))


def _without_axis(result: PairAttribution, axis: int) -> PairAttribution:
    """The result of one image against many without the one's axis."""
    names = ("maps_a", "maps_b", "raw_a", "raw_b", "contributions", "weights", "score", "valid")
    parts = {name: getattr(result, name).squeeze(axis) for name in names}
    extra = {name: value.squeeze(axis) for name, value in result.extra.items()}
    return dataclasses.replace(result, **parts, extra=extra)


def _refuse_unit_rows(embeddings: Tensor, reason: str) -> None:
    """A normalisation that cannot be looked behind would be differentiated."""
    length = embeddings.to(accumulation_dtype(embeddings.dtype)).norm(dim=1)
    if bool(((length - 1).abs() < 1e-3).all()):
        raise RuntimeError(
            "this network's embeddings have length 1, and what comes before their normalisation is out of sight, since "
            f"{reason}; return the embedding before it is normalised, or pass embedding='avg'"
        )
