"""An embedding network on one side of a comparison: images, or what is kept of them, and the way back to features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastcam._dtypes import accumulation_dtype
from fastcam._network import Network, check_images, warn_if_training
from fastcam._weights_hash import kept_hash
from fastcam.gallery import Gallery
from fastcam.methods import pair
from fastcam.program.capture import Program
from fastcam.program.embedding import described, picked, unnormalised
from fastcam.program.execute import Weights
from fastcam.program.forward import Forward, Session
from fastcam.program.hooks import HookSession
from fastcam.program.layers import check_spatial, shown
from fastcam.program.session import CapturedSession
from fastcam.program.state import neutral_modes
from fastcam.program.targets import Targets

__all__ = ["EmbeddingNetwork", "Side", "SideOfPair", "integers"]

#: Features are no smaller than this where a power is taken of them.
_SMALLEST = 1e-6

_ONE_FOR_ONE = (
    "this network at layer '{layer}' explains pairs of images one for one only; for galleries and all against all it "
    "has to be captured, with nothing around the layer"
)
#: What a side of a comparison may be given as.
Side: TypeAlias = Tensor | Gallery
#: Many images or features: all of them, or batches.
Batches: TypeAlias = "Tensor | np.ndarray[Any, Any] | Iterable[Tensor | np.ndarray[Any, Any]]"


@dataclass(frozen=True, eq=False)
class SideOfPair:
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

    def __getitem__(self, rows: Any) -> SideOfPair:
        """The images of `rows`; they cannot be pulled back through a pass that was kept."""
        rows = slice(rows, rows + 1) if isinstance(rows, int) else rows
        return dataclasses.replace(self, features=self.features[rows], embeddings=self.embeddings[rows])


class EmbeddingNetwork(Network):
    """A network whose embeddings are compared by a pair method; the arguments are those of `PairExplainer`."""

    def __init__(self, model: nn.Module, method: str, options: dict[str, Any], **settings: Any):
        super().__init__(model, **settings)
        self.method = pair(method)
        self.options = self.method.make_options(options)

    def gallery(self, images: Batches, labels: Tensor | Sequence[int] | None = None, *, chunk: int = 32) -> Gallery:
        """Features and embeddings of images (N, C, *spatial), or of batches of them, run `chunk` at a time."""
        with neutral_modes():
            parts = [self._side(part) for part in _chunks(images, "images", chunk)]
        if len({part.image for part in parts}) > 1:
            raise ValueError("the images of a gallery must have one size; make one gallery for each")
        features, embeddings = [part.features for part in parts], [part.embeddings for part in parts]
        weights = self._weights_before(parts[0].session)
        return _gathered(parts[0], features, embeddings, labels, weights)

    def gallery_of_features(
        self,
        features: Batches,
        image: Sequence[int],
        labels: Tensor | Sequence[int] | None = None,
        *,
        chunk: int = 32,
    ) -> Gallery:
        """The gallery of images whose features were computed before: only what follows the layer runs.

        features  (N, K, *spatial) as the layer gives them, or batches of them: tensors or NumPy arrays, also in files
                  (`numpy.load(..., mmap_mode="r")`); brought to the network's dtype and device
        image     (C, *spatial), the size of the images they are of

        Which weights made the features is not known here, so the gallery's `weights` is None and nothing checks them.
        Raises TypeError for what is neither tensor nor array; ValueError for features of another shape, and for a
        network whose embeddings do not follow from them.
        """
        image = tuple(int(size) for size in image)
        blank = self._blank(image)
        session, length = self._session(blank)
        if not isinstance(session, CapturedSession) or (session.cut.bypass and not self._pools):
            raise ValueError(_ONE_FOR_ONE.format(layer=session.layer))
        wanted = session.cut.program.nodes[session.cut.feature].shape or ()
        kept, embeddings = [], []
        for part in _chunks(features, "features", chunk):
            if tuple(part.shape[1:]) != wanted[1:]:
                raise ValueError(
                    f"features of layer '{session.layer}' for images {image} are {shown(wanted)}; "
                    f"got {tuple(part.shape)}"
                )
            part = part.detach().to(device=blank.device, dtype=session.bound.dtype)
            some = part if len(part) else part.new_zeros((1, *part.shape[1:]))
            kept.append(part)
            embeddings.append(self._from_features(session, some)[: len(part)])
        side = SideOfPair(session, kept[0], embeddings[0], image, length)
        return _gathered(side, kept, embeddings, labels, None)

    def _side(self, given: Side) -> SideOfPair:
        if isinstance(given, Gallery):
            session, length = self._session(self._blank(given.image, given.features))
            if session.layer != given.layer:
                raise ValueError(f"the gallery holds layer '{given.layer}', this explainer reads '{session.layer}'")
            self._check_origin(given, session)
            return SideOfPair(session, given.features, given.embeddings, given.image, length)
        check_images(given)
        warn_if_training(self.model)
        images = given.clone() if given.is_inference() else given
        if len(images) == 0:
            one = self._side(images.new_zeros((1, *images.shape[1:])))
            return dataclasses.replace(one, features=one.features[:0], embeddings=one.embeddings[:0], passed=None)
        session, length = self._session(images)
        # Features that say nothing alone have to keep their pass.
        lone = not isinstance(session, CapturedSession) or bool(session.cut.bypass)
        lone = lone and not self._pools
        passed = session.forward(images, "gradients" if lone else "closed_form", by_index=False)
        features = self._reshaped(passed.features, session)
        told = self.options.reshape_transform is not None
        check_spatial((None, *features.shape[1:]), passed.layer, images.ndim - 2, told)
        embeddings = self._embedded(self._taken(session, passed.output), features)
        if isinstance(session, HookSession) and lone:
            _refuse_unit_rows(embeddings, session.reason)
        image = tuple(images.shape[1:])
        return SideOfPair(session, passed.features, embeddings, image, length, passed if lone else None)

    def _blank(self, image: Sequence[int], like: Tensor | None = None) -> Tensor:
        """An image of that size, as the model takes them."""
        like = torch.zeros(()) if like is None else like
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), like)
        return torch.zeros((1, *image), dtype=parameter.dtype, device=parameter.device)

    def _session(self, images: Tensor) -> tuple[Session, float | None]:
        """The network at the layer, and the length it brings its embeddings to, where it does."""
        length = None

        def rewrite(program: Program) -> Program:
            nonlocal length
            if self._pools:
                return program
            if callable(self.options.embedding):
                program = picked(program, self.options.embedding)
            found = program.embedding or unnormalised(program, Weights(program, self.model).values())
            length = found.length
            return found.program

        session = self._network_at(
            images, self.method.name, self.options, "closed_form", rewrite=rewrite, arranged=True
        )
        return session, length

    def _check_origin(self, gallery: Gallery, session: Session) -> None:
        """That the gallery's features are of these weights, as far as is known, and its embeddings what this network
        makes of them."""
        weights = gallery.weights and self._weights_before(session)
        if weights != gallery.weights:
            raise ValueError(
                f"the gallery's features were computed with other weights ({gallery.weights}) than this network has up "
                f"to layer '{session.layer}' ({weights}); make it anew with explainer.gallery(images)"
            )
        if not isinstance(session, CapturedSession) or session.cut.bypass or len(gallery) == 0:
            return
        features, found = gallery.features[:1], gallery.embeddings[:1]
        if features.dtype == session.bound.dtype:
            expected = self._from_features(session, features)
            scale = expected.abs().max()
            if expected.shape == found.shape and bool((expected.float() - found.float()).abs().max() <= 2e-2 * scale):
                return
        raise ValueError(
            f"the gallery's embeddings, {found.dtype} with {found.shape[1]} channels, are not what this explainer "
            "makes of its features: it was made by another model, with other weights, another pooling or precision; "
            "make it anew with explainer.gallery(images)"
        )

    def _weights_before(self, session: Session) -> str:
        """Hash of the weights that the layer's features depend on; of all, where the network is not captured."""
        leaves = session.weights_before() if isinstance(session, CapturedSession) else self.model.state_dict()
        return kept_hash(self.model, leaves)

    def _from_features(self, session: CapturedSession, features: Tensor) -> Tensor:
        """The embeddings that follow from features alone."""
        with neutral_modes():
            output = None if self._pools else session.cut.run_probe(features, session.leaves)
            return self._embedded(output, self._reshaped(features, session))

    @property
    def _pools(self) -> bool:
        """Whether embeddings are the pooled features rather than from the model's output."""
        return self.options.embedding in ("avg", "max", "gem")

    def _reshaped(self, features: Tensor, session: Session) -> Tensor:
        transform = self.options.reshape_transform or session.arrangement()
        return features if transform is None else transform(features)

    def _taken(self, session: Session, output: Any) -> Any:
        """What `options.embedding` takes from the model's output; a captured network ends in it."""
        pick = self.options.embedding
        return pick(output) if callable(pick) and isinstance(session, HookSession) else output

    def _embedded(self, output: Any, features: Tensor) -> Tensor:
        """(B, D) embeddings by `options.embedding`."""
        options = self.options
        if self._pools:
            return _pooled(features, options.embedding, options.gem_power)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"'{self.method.name}' compares embeddings, a tensor (B, D); this model returns {described(output)}. "
                "Pass embedding=lambda output: output[...] to take one of them, or embedding='avg' for the layer's "
                "pooled features"
            )
        if output.ndim != 2:
            raise ValueError(
                f"'{self.method.name}' compares embeddings (B, D); this model's output is {tuple(output.shape)}: pass "
                "embedding='avg' ('max', 'gem') for the layer's pooled features"
            )
        return output

    def _channels(self, side: SideOfPair, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """(R, K): weights (R, D) of the embedding's channels, pulled back to feature channels, of `rows`."""
        options = self.options
        if options.embedding in ("avg", "max"):
            return weights
        if options.embedding == "gem":
            # d z_k / d A = A^(p - 1) z_k^(1 - p) / Z, summed over positions
            features = self._reshaped(side.features, side.session).to(weights.dtype).clamp(min=_SMALLEST).flatten(2)
            power = options.gem_power - 1
            factor = features.pow(power).mean(2) / side.embeddings.to(weights.dtype).pow(power)
            return weights * (factor if rows is None else factor[rows])

        def summed(gradients: Tensor) -> Tensor:
            return _summed(self._reshaped(gradients, side.session), weights.dtype)

        if side.passed is not None:
            if rows is not None and not torch.equal(rows, torch.arange(len(side), device=rows.device)):
                raise ValueError(_ONE_FOR_ONE.format(layer=side.session.layer))
            score = Targets(None, lambda output: (self._taken(side.session, output) * weights).sum(1))
            found = side.passed.gradients(score)
        elif not isinstance(side.session, CapturedSession):
            if len(weights) > 0:
                raise ValueError(_ONE_FOR_ONE.format(layer=side.session.layer))
            return weights.new_zeros((0, self._reshaped(side.features, side.session).shape[1]))
        else:
            rows = torch.arange(len(side), device=weights.device) if rows is None else rows
            return side.session.pull_back(side.features, weights, rows, summed)
        return summed(found)


def _chunks(given: Batches, what: str, size: int) -> Iterator[Tensor]:
    """Parts of at most `size` rows."""
    if size < 1:
        raise ValueError(f"chunk must be at least 1; got {size}")
    batches = [given] if isinstance(given, (Tensor, np.ndarray)) else given
    if not isinstance(batches, Iterable):
        raise TypeError(f"{what} must be a tensor, an array, or batches of them; got {type(given).__name__}")
    empty = True
    for batch in batches:
        empty = False
        if not isinstance(batch, (Tensor, np.ndarray)):
            raise TypeError(f"{what} must be a tensor, an array, or batches of them; got a batch {batch!r:.60}")
        if batch.ndim == 0:
            raise ValueError(f"{what} must be (N, ...); got a single number")
        for start in range(0, len(batch), size) or (0,):
            part = batch[start : start + size]
            # Copied: arrays in files may not be written to, which torch warns of.
            yield part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    if empty:
        raise ValueError(f"a gallery needs at least one batch of {what}")


def _gathered(
    first: SideOfPair, features: list[Tensor], embeddings: list[Tensor], labels: Any, weights: str | None
) -> Gallery:
    count = sum(len(part) for part in features)
    given = None if labels is None else integers(labels, "labels")
    if given is not None and tuple(given.shape) != (count,):
        raise ValueError(f"labels must be ({count},), one for each image; got {tuple(given.shape)}")
    together = torch.cat(features), torch.cat(embeddings)
    return Gallery(*together, given, first.image, first.session.layer, first.length, weights)


def integers(given: Any, name: str, device: torch.device | None = None) -> Tensor:
    """The tensor of integers that was given; TypeError for anything else."""
    try:
        found = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers; got {given!r:.60}. Number them, as by names.index(name)") from error
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {found.dtype}")
    return found


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


def _refuse_unit_rows(embeddings: Tensor, reason: str) -> None:
    """A normalisation that cannot be looked behind would be differentiated."""
    length = embeddings.to(accumulation_dtype(embeddings.dtype)).norm(dim=1)
    if bool(((length - 1).abs() < 1e-3).all()):
        raise RuntimeError(
            "this network's embeddings have length 1, and what comes before their normalisation is out of sight, since "
            f"{reason}; return the embedding before it is normalised, or pass embedding='avg'"
        )
