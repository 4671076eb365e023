"""What a method is: a formula from a passage through a cut network to evidence, with its name, options and source."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam.program.forward import Forward, Needs, Reference, Relevances, score_slopes
from fastcam.program.targets import Targets, class_scores, scores_of

__all__ = ["CamOptions", "Evidence", "Method", "MethodOptions", "PairMethod", "Passage", "Pixels", "Shares"]
__all__ += ["check_epsilon"]


@dataclass(frozen=True)
class MethodOptions:
    """Options every method takes.

    reshape_transform  callable that turns the layer's output (tokens, channels-last blocks) into (B, K, *spatial); it
                       must only move elements around, since gradients go through it too. None: as the network's graph
                       has it (`fastcam.program.arrangement`): channels last are moved first, tokens laid out on the
                       grid of the convolution that made them, class tokens and the like left out
    on_nonfinite       "raise": ValueError naming the tensor and the image · "mask": that image's maps are zeros and
                       `Attribution.valid` is False · None: raise on the CPU, mask on accelerators, where raising
                       would cost a synchronisation
    """

    reshape_transform: Callable[[Tensor], Tensor] | None = None
    on_nonfinite: Literal["raise", "mask"] | None = None

    def needed(self, usual: Needs) -> Needs:
        """What the formula reads under these options, where `Method.needs` is what it usually does."""
        return usual

    def __post_init__(self) -> None:
        if self.on_nonfinite not in (None, "raise", "mask"):
            raise ValueError(f"on_nonfinite must be 'raise', 'mask' or None; got {self.on_nonfinite!r}")
        if self.reshape_transform is not None and not callable(self.reshape_transform):
            raise TypeError(f"reshape_transform must be a callable; got {type(self.reshape_transform).__name__}")


@dataclass(frozen=True)
class CamOptions(MethodOptions):
    """Options every CAM-type method takes: those of `MethodOptions`, and

    relu          keep only positive evidence: M -> max(M, 0)
    eigen_smooth  M is the first principal component of the weighted maps instead of their sum, as in `eigen_cam`; maps
                  that are no weighted sum stay as they are
    """

    relu: bool = True
    eigen_smooth: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(relu=self.relu, eigen_smooth=self.eigen_smooth)


def check_flags(**options: Any) -> None:
    """Raises TypeError for an option that is neither True nor False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")


@dataclass(frozen=True)
class Pixels:
    """What the pixel values mean.

    mean, std  per channel, as subtracted and divided by when the images were prepared; None: ImageNet's, for images of
               three channels
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def normalize(self, value: Tensor | float, like: Tensor) -> Tensor:
        """Pixels in [0, 1], a number or (B, C, *spatial), as the model sees them: (B or 1, C, 1...) or larger."""
        channels = like.shape[1]
        if self.mean is None and channels != 3:
            raise ValueError(
                f"a named reference needs to know how the images were normalised; these have {channels} channels: pass "
                f"mean= and std= with {channels} numbers each"
            )
        mean, std = self.mean or (0.485, 0.456, 0.406), self.std or (0.229, 0.224, 0.225)
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean and std must hold one number for each of the images' {channels} channels; got {mean} and {std}"
            )
        shape = (1, -1, *(1,) * (like.ndim - 2))
        center, scale = (like.new_tensor(numbers).reshape(shape) for numbers in (mean, std))
        return (value - center) / scale


class Passage:
    """A batch after its pass through the network, as a method sees it.

    images    (B, C, *spatial) as given
    features  (B, K, *spatial), rearranged where the layer gives something else
    output    the model's output
    targets   the resolved targets
    layer     the layer's name
    uniform   whether the head is affine with gradients that are the same at every position
    linear    whether the head is affine, so that multipliers are gradients
    pixels    how the images were normalised
    """

    def __init__(
        self,
        forward: Forward,
        images: Tensor,
        features: Tensor,
        targets: Targets,
        options: MethodOptions,
        pixels: Pixels | None = None,
        reshape: Callable[[Tensor], Tensor] | None = None,
    ):
        self.images = images
        self.features = features
        self.output = forward.output
        self.targets = targets
        self.layer = forward.layer
        self.uniform = forward.uniform
        self.linear = forward.linear
        self.pixels = pixels or Pixels()
        self._forward = forward
        self._reshape = reshape or options.reshape_transform

    @property
    def rearranged(self) -> bool:
        """Whether the layer gives something else than (B, K, *spatial)."""
        return self._reshape is not None

    @property
    def whole(self) -> bool:
        """Whether every value the layer gives is among `features`: rearranging may leave out class tokens."""
        return self.features[:1].numel() == self._forward.features[:1].numel()

    @property
    def spatial_rank(self) -> int:
        return self.features.ndim - 2

    def scores(self, output: Any = None) -> Tensor:
        """(B,) or (B, T) scores explained, of this pass or in another output of B or 1 rows."""
        output = self.output if output is None else output
        batch = self.features.shape[0]
        output = torch.utils._pytree.tree_map_only(Tensor, lambda t: _rows(t, batch), output)
        if self.targets.indices is not None:
            chosen = self.targets.indices
            found = class_scores(output).gather(1, chosen if chosen.ndim == 2 else chosen.unsqueeze(1))
            return found if chosen.ndim == 2 else found.squeeze(1)
        return scores_of(output, self.targets, None, batch, self.layer, differentiable=False)

    def gradients(self) -> Tensor:
        """d score / d features, (B, K, *spatial) or (B, T, K, *spatial); stride 0 over positions on closed heads."""
        return self._reshaped(self._forward.gradients(self.targets))

    @property
    def columns(self) -> int:
        """Targets an image."""
        indices = self.targets.indices
        return indices.shape[1] if indices is not None and indices.ndim == 2 else 1

    def full_gradients(self, visits: Sequence[Callable[[Tensor, bool], None]]) -> Tensor:
        """`gradients`, and on the way every bias x gradient, told to the visitor of its target column.

        visits  for each target of an image: called with a product, and whether it is a feature map (B, K, *spatial) or
                something else (B, n)
        """
        return self._reshaped(self._forward.full_gradients(self.targets, visits))

    def reference(self, features: Tensor | None = None) -> Reference:
        """A reference of features as the layer gives them, (1 or B, ...); None: zeros, one for all images."""
        if features is None:
            features = torch.zeros_like(self._forward.features[:1])
        return self._forward.reference(features)

    def reference_image(self, images: Tensor, key: Hashable = None) -> Reference:
        """Features of reference images (1 or B, C, *spatial); kept for the next call where `key` names them."""
        session = self._forward.session

        def make() -> Reference:
            return self._forward.reference(session.features(images))

        return session.shared_reference(key, make) if key is not None else make()

    def difference(self, reference: Reference) -> tuple[Tensor, Tensor]:
        """DeepLIFT multipliers (B[, T], K, *spatial) between reference and this pass, and the reference's features."""
        return self._reshaped(self._forward.multipliers(self.targets, reference)), self.features_of(reference)

    def features_of(self, reference: Reference) -> Tensor:
        """(1 or B, K, *spatial) features of a reference, rearranged as this pass's are."""
        return reference.features if self._reshape is None else self._reshape(reference.features)

    @property
    def logits(self) -> Any:
        """The output, or what a softmax at the end of the network reads: where relevance starts."""
        return self._forward.logits()

    def relevance(self, seeds: Sequence[Any], layers: Sequence[str] = ()) -> Relevances:
        """Relevance at the layer from that at `logits` - or at the image from that at the layer, for methods that start
        there - for each of `seeds`, and at further layers by name. Once for each passage."""
        found, others = self._forward.relevance(seeds, layers)
        return found if self._reshape is None else [self._reshape(one) for one in found], others

    def score_slopes(self) -> list[Any]:
        """d score / d output for a target that is a callable: one for each tensor of the output."""
        leaf = lambda t: t.detach().requires_grad_() if t.is_floating_point() else t  # noqa: E731
        return score_slopes(self.output, self.targets, None, self.images.shape[0], self.layer, leaf)

    def output_of(self, images: Tensor, folded: bool = False) -> Any:
        """The model's output for other images; `folded`: by the fastest way that is equal to rounding."""
        return self._forward.session.output(images, folded)

    def again(self, images: Tensor, options: MethodOptions) -> Passage:
        """Another pass, for the same targets, on images of the same shape, ready for gradients."""
        passed = self._forward.session.forward(images, "gradients", self.targets.indices is not None)
        features = passed.features if self._reshape is None else self._reshape(passed.features)
        return Passage(passed, images, features, self.targets, options, self.pixels, self._reshape)

    def release(self) -> None:
        """Give up what was recorded for gradients, for methods that will take them from other passes."""
        self._forward.release()

    def output_with(self, features: Tensor, rows: Tensor) -> Any:
        """The output with other features (n, K, *spatial) in the place of those of images `rows` (n,)."""
        return self._forward.head(features if self._reshape is None else self._restored(features, rows), rows)

    def _restored(self, features: Tensor, rows: Tensor) -> Tensor:
        """Reshaped features put back where the layer has them; what `reshape_transform` dropped stays the image's."""
        assert self._reshape is not None
        layer = self._forward.features
        positions = torch.arange(layer[0].numel(), device=layer.device).reshape(1, *layer.shape[1:])
        moved = self._reshape(positions).flatten(1).expand(len(rows), -1)
        return (
            layer[rows].flatten(1).scatter(1, moved, features.flatten(1).to(layer.dtype)).reshape(-1, *layer.shape[1:])
        )

    def _reshaped(self, found: Tensor) -> Tensor:
        if self._reshape is None:
            return found
        if not self.targets.several:
            return self._reshape(found)
        return torch.stack([self._reshape(one) for one in found.unbind(1)], dim=1)


def _rows(tensor: Tensor, batch: int) -> Tensor:
    return tensor.expand(batch, *tensor.shape[1:]) if tensor.ndim and tensor.shape[0] == 1 else tensor


@dataclass(frozen=True)
class Evidence:
    """What a method hands to the shared end of the pipeline; exactly one of the first three is given.

    weights      (B, K) or (B, T, K) channel coefficients: the map is sum_k weights_k A_k
    multipliers  (B, K, *spatial) or (B, T, K, *spatial): the map is sum_k multipliers_k * A_k
    projection   (B, *spatial) or (B, T, *spatial): the map itself
    reference    (1 or B, K, *spatial) features to be subtracted from A first, or None
    shown        (B, K) or (B, T, K) channel coefficients for `Attribution.weights` where the map is not made of them
    delta        (B,) or (B, T) completeness residual, or None
    extra        further results for `Attribution.extra`, by name; tensors of B rows
    """

    weights: Tensor | None = None
    multipliers: Tensor | None = None
    projection: Tensor | None = None
    reference: Tensor | None = None
    shown: Tensor | None = None
    delta: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shares:
    """A similarity split over embedding channels.

    contributions  (B, D) what each channel contributes
    weights        (B, D) the same for both images
    score          (B,) the similarity: cosine, or minus the squared distance
    """

    contributions: Tensor
    weights: Tensor
    score: Tensor


def check_epsilon(value: object) -> None:
    """ValueError unless `value` is None or a finite number of at least 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= float(value) < float("inf")):  # type: ignore[arg-type]
        raise ValueError(f"epsilon must be None or a finite number, not negative; got {value!r}")


def _options(method: Any, given: dict[str, Any]) -> Any:
    """The options dataclass of a method with `given` filled in; TypeError for a name it does not know."""
    known = [f.name for f in dataclasses.fields(method.options) if f.init]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"method '{method.name}' has no option {name!r}; {hint}its options are: {', '.join(known)}")
    return method.options(**given)


@dataclass(frozen=True)
class PairMethod:
    """A row of the registry that explains the similarity of two images (`fastcam.attribute_pair`).

    name       what users pass as `method=`
    summary    one line
    source     paper
    shares     (embeddings (B, D), embeddings (B, D), options, length they are compared at or None) -> `Shares`
    among      (embeddings (B, D), embeddings (B, S, D), chosen (B, S), options, ...) -> `Shares` of one among several
    options    the dataclass of its options, defaults included
    explains   "pairs of images"
    certainty  what of it is reconstructed rather than read in the source
    """

    name: str
    summary: str
    source: str
    shares: Callable[..., Shares]
    among: Callable[..., Shares]
    options: type[CamOptions] = CamOptions
    explains: str = "pairs of images"
    certainty: str | None = None

    def make_options(self, given: dict[str, Any]) -> Any:
        """The options dataclass with `given` filled in; TypeError for a name the method does not know."""
        return _options(self, given)


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    name       what users pass as `method=`
    summary    one line
    source     paper and equation
    evidence   the formula
    needs      what the formula reads beside features and scores: "features" (nothing), "closed_form" (gradients, where
               `Passage.linear`), "gradients", "biases" (gradients, of all biases too), "multipliers", "parts"
    options    the dataclass of its options, defaults included
    pixels     whether layer=None means the input pixels rather than the last feature map
    signed     whether normalised maps are divided by their largest magnitude, to [-1, 1], rather than min-max scaled
    start      (program, model, spatial dimensions) -> the layer that layer=None stands for, a name or the index of a
               value; None: the last feature map, or the input. The program is None where the network is not captured
    explains   "images", of any network, or what else
    certainty  what of it is reconstructed rather than read in the source, where that is so
    """

    name: str
    summary: str
    source: str
    evidence: Callable[[Passage, Any], Evidence]
    needs: Needs
    options: type[MethodOptions] = CamOptions
    pixels: bool = False
    signed: bool = False
    start: Callable[[Any, Any, int], int | str | None] | None = None
    explains: str = "images"
    certainty: str | None = None

    def make_options(self, given: dict[str, Any]) -> MethodOptions:
        """The options dataclass with `given` filled in; TypeError for a name the method does not know."""
        options: MethodOptions = _options(self, given)
        return options
