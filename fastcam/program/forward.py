"""One pass through a network at a layer, and what can be asked about it afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
from torch import Tensor

from .targets import Targets, scores_of

__all__ = ["Backward", "Forward", "Needs", "Reference", "Relevances", "Session", "SharedGraph", "detached"]

#: What a method will ask a pass for: nothing but features and scores; gradients where they are closed form and nothing
#: otherwise; gradients; gradients together with those of all biases; DeepLIFT multipliers by the Rescale rule; or by
#: RevealCancel, which keeps signed parts.
Needs = Union[Literal["features", "closed_form", "gradients", "biases", "multipliers", "parts"], "Backward"]

#: Relevance at where a walk ends, for each target, and at the layers asked for, by name.
Relevances = tuple[list[Tensor], dict[str, list[Tensor]]]


@dataclass(frozen=True, eq=False)
class Backward:
    """A pass that relevance will be walked back through.

    composer  chooses the rules (`fastcam.program.relevance`); the walk is kept for as long as it lives
    below     walk from the layer down to the image, with gradients of the score at the layer, rather than from the
              output down to the layer
    folded    fold batch norms into the convolutions before them
    """

    composer: Any
    below: bool = False
    folded: bool = True


class Session(ABC):
    """A network at a layer, ready to run with the weights it has at this moment; made for one call.

    layer    the layer's name
    uniform  whether the head is affine and its gradients are the same at every position
    """

    layer: str
    uniform = False

    @abstractmethod
    def forward(self, images: Tensor, needs: Needs, by_index: bool) -> Forward:
        """Run the network on `images` (B, C, *spatial), ready for what `needs` says.

        by_index  whether the targets will be class indices rather than a callable
        """

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """The layer's features of other images; what follows the layer does not run."""

    @abstractmethod
    def output(self, images: Tensor, folded: bool = False) -> Any:
        """The model's output for other images.

        folded  run the network as fast as it goes where only scores count: batch norms folded, weights packed where
                that is possible. Equal to rounding
        """

    def arrangement(self) -> Callable[[Tensor], Tensor] | None:
        """What brings the layer's output into (B, K, *spatial), where it is known and needed."""
        return None

    def shared_reference(self, key: Hashable, make: Callable[[], Reference]) -> Reference:
        """`make()`, or what it gave for the same key and the same weights."""
        return make()


@dataclass(frozen=True)
class Reference:
    """A reference the features are compared with.

    features  (B, K, *spatial), or (1, K, *spatial) for all images
    output    the model's output for them, of the same batch size
    recorded  the pass through the head as the walk back reads it, or None where the head is affine
    """

    features: Tensor
    output: Any
    recorded: Any = None


class Forward(ABC):
    """What a pass leaves behind.

    features   (B, K, *spatial), or what the layer gives, detached
    output     the model's output, detached
    layer      the layer's name
    linear     whether the head is affine and its gradients closed form
    uniform    whether they are the same at every position, too
    """

    _graph: Graph | None = None

    def __init__(self, session: Session, features: Tensor, output: Any, linear: bool = False, uniform: bool = False):
        self.session = session
        self.layer = session.layer
        self.features = features
        self.output = output
        self.linear = linear
        self.uniform = uniform

    @abstractmethod
    def gradients(self, targets: Targets) -> Tensor:
        """d score / d features: (B, K, *spatial), or (B, T, K, *spatial) for T targets an image.

        Closed form where the head is affine, else one backward pass through the head for each target column.

        Raises RuntimeError where the score does not depend on the layer.
        """

    def full_gradients(self, targets: Targets, visits: Sequence[Callable[[Tensor, bool], None]]) -> Tensor:
        """As `gradients`, and every bias x gradient on the way told to the visitor of its target column
        (`fastcam.program.biases`)."""
        raise RuntimeError(f"layer '{self.layer}' was passed without recording biases")

    def release(self) -> None:
        """Forget what was recorded for gradients; they can no longer be asked for."""
        self._graph = None

    @abstractmethod
    def reference(self, features: Tensor) -> Reference:
        """Features (1 or B, K, *spatial) as a reference, run through the head."""

    @abstractmethod
    def multipliers(self, targets: Targets, reference: Reference) -> Tensor:
        """DeepLIFT multipliers of the scores between `reference` and this pass, shaped as `gradients`."""

    def logits(self) -> Any:
        """The output, or what a softmax at the end of the network reads: where relevance starts."""
        raise RuntimeError(f"layer '{self.layer}' was passed without recording values for relevance")

    def relevance(self, seeds: Sequence[Any], layers: Sequence[str] = ()) -> Relevances:
        """Relevance at the layer from that at `logits` (or at the image from that at the layer), for each of `seeds`.

        seeds   each shaped as where the walk starts; a list where the model's output is a structure
        layers  names of layers whose relevance is wanted too

        Uses the pass up.
        """
        raise RuntimeError(f"layer '{self.layer}' was passed without recording values for relevance")

    @abstractmethod
    def head(self, features: Tensor, rows: Tensor) -> Any:
        """The output with other features (n, K, *spatial) in the place of those of images `rows` (n,)."""


class Graph:
    """A recorded head: gradients of scores with respect to its leaf."""

    def __init__(self, leaf: Tensor, output: Any, layer: str):
        self._leaves: list[Tensor] = [leaf]
        self._output = output
        self._layers = [layer]

    def gradients(self, targets: Targets, start: Callable[[int], None] | None = None) -> Tensor:
        """One backward pass for each target column, whose number `start` is told; the graph is freed by the last."""
        return self._all_gradients(targets, start)[0]

    def _all_gradients(self, targets: Targets, start: Callable[[int], None] | None = None) -> list[Tensor]:
        leaves = self._leaves
        if not leaves:
            raise RuntimeError("the gradients of this pass have been taken already")
        found = []
        columns = columns_of(targets)
        for number, column in enumerate(columns):
            with torch.enable_grad():
                score = scores_of(self._output, targets, column, leaves[0].shape[0], self._layers[0]).sum()
            if not score.requires_grad:
                raise RuntimeError(f"the score does not depend on layer '{self._layers[0]}'")
            keep = number + 1 < len(columns)
            if start is not None:
                start(number)
            gradients = torch.autograd.grad(score, leaves, retain_graph=keep, allow_unused=True)
            for gradient, layer in zip(gradients, self._layers, strict=True):
                if gradient is None:
                    raise RuntimeError(f"the score does not depend on layer '{layer}'")
            found.append(gradients)
        self._output, self._leaves = None, []
        return [torch.stack(one, dim=1) if targets.several else one[0] for one in zip(*found, strict=True)]


class SharedGraph(Graph):
    """A recorded head with several leaves, the first above all others: one pass back serves all."""

    def __init__(self, leaves: Sequence[Tensor], output: Any, layers: Sequence[str]):
        super().__init__(leaves[0], output, layers[0])
        self._leaves, self._layers = list(leaves), list(layers)
        self._found: list[Tensor] = []

    def parts(self) -> list[Graph]:
        """A graph for each leaf; they must be asked for the same targets."""
        return [_Part(self, number) for number in range(len(self._leaves))]

    def part(self, number: int, targets: Targets) -> Tensor:
        if not self._found:
            self._found = self._all_gradients(targets)
        return self._found[number]


class _Part(Graph):
    def __init__(self, whole: SharedGraph, number: int):
        self._whole = whole
        self._number = number

    def gradients(self, targets: Targets, start: Callable[[int], None] | None = None) -> Tensor:
        return self._whole.part(self._number, targets)


def columns_of(targets: Targets) -> list[int | None]:
    """Columns of two-dimensional targets; [None] for one target an image."""
    if targets.indices is not None and targets.indices.ndim == 2:
        return list(range(targets.indices.shape[1]))
    return [None]


def score_slopes(
    output: Any, targets: Targets, column: int | None, batch: int, layer: str, create: Callable[[Tensor], Tensor]
) -> Any:
    """d score / d output, in the output's structure, at `create`'s copies of its tensors."""
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    with torch.enable_grad():
        free = [create(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        score = scores_of(torch.utils._pytree.tree_unflatten(free, spec), targets, column, batch, layer).sum()
    wanted = [leaf for leaf in free if isinstance(leaf, Tensor) and leaf.requires_grad]
    found = iter(torch.autograd.grad(score, wanted, allow_unused=True))
    return [next(found) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in free]


def detached(value: Any) -> Any:
    """`value` with every tensor in it detached."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)
