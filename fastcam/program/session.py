"""Running a captured network cut at a layer."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcam._tracing import tracing
from fastcam._watch import stage

from .affine import AffineHead
from .biases import BiasedGraph, Visit
from .capture import CaptureError, Program, capture
from .cut import Cut, cut
from .execute import Weights
from .forward import (
    Backward,
    Forward,
    Graph,
    Needs,
    Reference,
    Relevances,
    Session,
    SharedGraph,
    columns_of,
    detached,
    score_slopes,
)
from .layers import find_layer
from .multipliers import Recorded, one_for_all
from .nodes import Ref
from .packed import packs
from .relevance import Passed, RelevanceWalk
from .relevance import known as known_relevance
from .rescale import known
from .reveal_cancel import SignedWalk
from .state import neutral_modes, unwrap
from .targets import Targets, class_scores

__all__ = ["Bindings", "Bound", "CapturedSession", "fastest"]

#: Reference passes kept for one explainer and layer.
_REFERENCES = 4
#: Feature maps that go back through a head at once.
_ROWS = 64


class Bound:
    """A cut bound to a model and a precision, with what is kept between calls: converted weights, reference passes.

    walked  relevance goes back through it, whose steps keep what they make of the weights as long as those live
    """

    def __init__(
        self,
        made: Cut,
        model: nn.Module,
        own: torch.dtype,
        precision: torch.dtype | None = None,
        channels_last: bool = False,
        compiled: bool = False,
        walked: bool = False,
    ):
        self.cut = made
        self.dtype = precision or own
        self.channels_last = channels_last
        self.compiled = compiled
        self.model = model
        self.weights = Weights(made.program, model, precision, channels_last, lasting=made.packed or walked)
        self.references: OrderedDict[Hashable, Reference] = OrderedDict()
        self._walk: tuple[Backward, int, RelevanceWalk] | None = None

    def relevance_walk(self, needs: Backward) -> RelevanceWalk:
        """The way of relevance, kept from call to call: an explainer's method has one."""
        rules = known_relevance()
        if self._walk is None or self._walk[0] is not needs or self._walk[1] != rules:
            self._walk = (needs, rules, self.cut.relevance_walk(needs.composer, needs.below))
        return self._walk[2]

    def session(self, folded: Callable[[], CapturedSession] | None = None) -> CapturedSession:
        """The network with the weights of this moment; `folded` gives its folded twin where this one is not."""
        return CapturedSession(self, folded)


class Bindings:
    """The cuts one explainer has bound to its model, kept from call to call.

    model          an unwrapped module
    precision      the dtype to run in, or None: the model's own
    channels_last  run in channels_last layout
    compiled       run through torch.compile
    """

    def __init__(self, model: nn.Module, precision: torch.dtype | None, channels_last: bool, compiled: bool):
        self._model = model
        self._precision = precision
        self._channels_last = channels_last
        self._compiled = compiled
        self._kept: weakref.WeakKeyDictionary[Cut, Bound] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # made again where it is unpickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = weakref.WeakKeyDictionary()

    def session(
        self,
        program: Program,
        feature: int,
        layer: str,
        own: torch.dtype,
        foldable: bool = True,
        fold: bool = False,
        wide: bool = False,
    ) -> CapturedSession:
        """`program` at value `feature`, with the weights of this moment; `own` is the model's dtype.

        foldable, fold  whether batch norms may be folded into convolutions; whether they must be
        wide            for walks of relevance: run a float16 network in float32, since what is divided by small
                        numbers leaves float16's range, and in the layout that packed convolutions are fastest in
        """
        # A run that converts the weights may as well fold the batch norms; the plain one gives the model's own bits.
        converted = fold or (foldable and (self._precision is not None or self._channels_last))
        if converted:
            return self._folded(program, feature, layer, own, wide)
        plain = self._bound(cut(program, feature, layer), own, wide)
        return plain.session(lambda: self._folded(program, feature, layer, own))

    def _folded(
        self, program: Program, feature: int, layer: str, own: torch.dtype, wide: bool = False
    ) -> CapturedSession:
        """The session with folded batch norms, and packed weights unless one is not finite: ReLU inside a packed
        convolution makes zeros of NaN, which nobody would notice."""
        packed = self._bound(cut(program, feature, layer, folded=True), own, wide)
        session = packed.session()
        if packed.weights.finite:
            return session
        return self._bound(cut(program, feature, layer, folded=True, packed=False), own, wide).session()

    def _bound(self, made: Cut, own: torch.dtype, wide: bool = False) -> Bound:
        if made not in self._kept:
            half = (self._precision or own) == torch.float16
            precision = torch.float32 if wide and half else self._precision
            # A walk back is mostly convolutions, and packed ones need not reorder their maps in this layout.
            planar = len(made.program.nodes[made.program.input].shape or ()) == 4
            first = next(self._model.parameters(), None)
            last = wide and made.packed and planar and first is not None and packs(precision or own, first.device)
            layout = self._channels_last or last
            self._kept[made] = Bound(made, self._model, own, precision, layout, self._compiled, wide)
        return self._kept[made]


def fastest(model: nn.Module, images: Tensor) -> Callable[[Tensor], Any]:
    """The model, or where it can be captured its program with batch norms folded and weights packed: the same outputs
    to rounding, in half to three quarters of the time."""
    parameter = next(model.parameters(), None)
    if unwrap(model) is not model or parameter is None or parameter.dtype != images.dtype:
        return model
    try:
        program = capture(model, images)
    except CaptureError:
        return model
    bindings = Bindings(model, None, channels_last=False, compiled=False)
    return bindings.session(program, program.input, "input", images.dtype, fold=True).output


class CapturedSession(Session):
    """`Session` of a captured network.

    folded  makes the session of the same network with batch norms folded; None where this is it
    leaves  other weights than the model's (`Weights.made_of`)
    """

    def __init__(
        self,
        bound: Bound,
        folded: Callable[[], CapturedSession] | None = None,
        leaves: dict[int, Tensor] | None = None,
    ):
        self.layer = bound.cut.layer
        self.bound = bound
        self.cut = bound.cut
        self.leaves = bound.weights.values() if leaves is None else leaves
        self._make_folded = folded
        self._folded: CapturedSession | None = None

    def forward(
        self, images: Tensor, needs: Needs = "features", by_index: bool = True, closed_form: bool = True
    ) -> CapturedForward:
        """As `Session.forward`; `closed_form` False takes the long way where the closed form would do (for tests)."""
        if isinstance(needs, Backward) and not needs.below:
            return self._for_relevance(images, needs)
        walked: tuple[RelevanceWalk, Passed] | None = None
        if isinstance(needs, Backward):
            walk_below = self.bound.relevance_walk(needs)
            with neutral_modes(), stage("trunk"):
                passed = walk_below.record(self._prepared(images), self.leaves, images.shape[0])
            walked, values, needs = (walk_below, passed), dict(passed.values), "gradients"
        else:
            values = self._trunk(images)
        with neutral_modes():
            features = values[self.cut.feature]
            entering = self.cut.entering(values)
            closed_form = closed_form and needs not in ("features", "biases")
            affine = self._affine(features, by_index) if closed_form else None
            if needs == "multipliers" and affine is None:
                recorded = self.cut.walk().record(features, self.leaves | entering, images.shape[0])
                return CapturedForward(self, features, recorded.output, entering, recorded=recorded)
            walk = self.cut.signed_walk() if needs == "parts" and affine is None else None
            if needs in ("features", "closed_form") or affine is not None or walk is not None:
                output = self._run_head(values)
                return CapturedForward(self, features, output, entering, affine=affine, walk=walk, walked=walked)
            if needs == "biases":
                output, biased = self.cut.biases().run(values, self.layer)
                return CapturedForward(self, features, detached(output), entering, graph=biased)
            with torch.enable_grad():
                leaf = features.detach().requires_grad_()
                values[self.cut.feature] = leaf
                self.cut.head_graph.run(values, self.bound.compiled)
                output = self.cut.program.result(values)
            # Relevance of a class is that of its logit, also where the network ends in a softmax.
            seeded = walked is not None and by_index and isinstance(output, Tensor)
            scored = values[self.cut.starts[0]] if seeded else output
        return CapturedForward(
            self, features, detached(output), entering, graph=Graph(leaf, scored, self.layer), walked=walked
        )

    def forwards(
        self, images: Tensor, sessions: Sequence[CapturedSession], gradients: bool
    ) -> list[CapturedForward] | None:
        """One pass for several sessions of the network, this one among them, each at its own layer; None where one of
        the layers does not follow from this one's feature map. What follows them does not run again with other
        features.

        gradients  ready for those at all layers by one pass back
        """
        values = [session.cut.feature for session in sessions]
        if not set(values) <= self.cut.program.descendants(self.cut.feature):
            return None
        held = self._trunk(images)
        with neutral_modes():
            found: dict[int, Tensor] = {}

            def keep(index: int) -> None:
                if index in values:
                    found[index] = held[index]

            with torch.set_grad_enabled(gradients):
                first = held[self.cut.feature].detach().requires_grad_(gradients)
                held[self.cut.feature] = found[self.cut.feature] = first
                self.cut.head_graph.run(held, watch=keep)
                output = self.cut.program.result(held)
        layers = [session.layer for session in sessions]
        parts: list[Graph] = SharedGraph([found[index] for index in values], output, layers).parts()
        return [
            CapturedForward(
                session, found[session.cut.feature].detach(), detached(output), {}, graph=part if gradients else None
            )
            for session, part in zip(sessions, parts, strict=True)
        ]

    def pull_back(self, features: Tensor, slopes: Tensor, rows: Tensor, made_of: Callable[[Tensor], Tensor]) -> Tensor:
        """What is made of d <slopes, output> / d features, for images `rows` (R,) of `features` (N, K, *spatial).

        slopes   (R, D), for an output (N, D). Closed form where the head is; else it runs again, a few images at a time
        made_of  gradients (r, K, *spatial) of some of them -> r rows of the result

        Raises ValueError where what follows the layer reads the images by another way too.
        """
        if self.cut.bypass:
            raise ValueError(
                f"what follows layer '{self.layer}' reads the images by another way too (a skip around the layer), so "
                "its features alone do not do; pass images, one for one"
            )
        with neutral_modes():
            affine = self._affine(features, by_index=False)
            if affine is not None:
                return made_of(affine.from_scores(slopes, self.leaves, features))
            found = [made_of(features.new_zeros((0, *features.shape[1:])))]
            for part, slope in zip(rows.split(_ROWS), slopes.split(_ROWS), strict=True):
                with torch.enable_grad():
                    leaf = features[part].detach().requires_grad_()
                    score = (self.cut.run_probe(leaf, self.leaves) * slope).sum()
                    (gradient,) = torch.autograd.grad(score, leaf)
                found.append(made_of(gradient))
            return torch.cat(found)

    def _for_relevance(self, images: Tensor, needs: Backward) -> CapturedForward:
        values = self._trunk(images)
        walk = self.bound.relevance_walk(needs)
        features, entering = values[self.cut.feature], self.cut.entering(values)
        with neutral_modes():
            passed = walk.record(features, self.leaves | entering, images.shape[0])
            output = detached(self.cut.program.result(passed.values))
        return CapturedForward(self, features, output, entering, walked=(walk, passed))

    def features(self, images: Tensor) -> Tensor:
        return self._trunk(images)[self.cut.feature]

    def output(self, images: Tensor, folded: bool = False) -> Any:
        if folded and self._make_folded is not None:
            if self._folded is None:
                self._folded = self._make_folded()
            return self._folded.output(images)
        return self._run_head(self._trunk(images))

    def weights_before(self) -> dict[str, Tensor]:
        """Name -> tensor, for every leaf of the model that the features depend on."""
        live = self.bound.weights.own(self.cut.leaves_before)
        return {self.cut.program.nodes[index].target: tensor for index, tensor in live.items()}

    def arrangement(self) -> Callable[[Tensor], Tensor] | None:
        return self.cut.arrangement

    def shared_reference(self, key: Hashable, make: Callable[[], Reference]) -> Reference:
        """`make()`, or what it gave for the same key, weights and rules; the latest few are kept."""
        if self.cut.bypass or tracing():  # with a bypass it depends on the images too
            return make()
        kept = self.bound.references
        key = (key, known(), self.bound.weights.version())
        if key not in kept:
            kept[key] = make()
            while len(kept) > _REFERENCES:
                kept.popitem(last=False)
        return kept[key]

    def _trunk(self, images: Tensor) -> dict[int, Any]:
        values = dict(self.leaves)
        with neutral_modes(), stage("trunk"):
            values[self.cut.program.input] = self._prepared(images)
            self.cut.trunk.run(values, self.bound.compiled)
        return values

    def _prepared(self, images: Tensor) -> Tensor:
        four = self.bound.channels_last and images.ndim == 4
        layout = torch.channels_last if four else torch.preserve_format
        return images.to(dtype=self.bound.dtype, memory_format=layout)

    def _run_head(self, values: dict[int, Any]) -> Any:
        with neutral_modes(), stage("head"):
            self.cut.head.run(values, self.bound.compiled)
            return self.cut.program.result(values)

    def _affine(self, features: Tensor, by_index: bool) -> AffineHead | None:
        affine = self.cut.affine
        if affine is None or features.shape[0] == 0 or not (by_index or affine.pooled):
            return None
        return affine if affine.holds(self.cut.run_probe, self.leaves, features) else None


class CapturedForward(Forward):
    """`Forward` of a captured network: its head is closed form, a graph, recorded, or none of them."""

    session: CapturedSession

    def __init__(
        self,
        session: CapturedSession,
        features: Tensor,
        output: Any,
        entering: dict[int, Any],
        affine: AffineHead | None = None,
        graph: Graph | None = None,
        recorded: Recorded | None = None,
        walk: SignedWalk | None = None,
        walked: tuple[RelevanceWalk, Passed] | None = None,
    ):
        uniform = affine is not None and affine.uniform
        super().__init__(session, features, output, linear=affine is not None, uniform=uniform)
        self._entering = entering
        self._affine = affine
        self._graph = graph
        self._recorded = recorded
        self._walk = walk
        self._walked = walked
        self._logits: list[Any] = []
        if walked is not None and walked[0].stop == session.cut.feature:
            self._logits = [walked[1].values[index] for index in session.cut.starts]

    def logits(self) -> Any:
        return self._logits[0] if len(self._logits) == 1 else self._logits

    def relevance(self, seeds: Sequence[Any], layers: Sequence[str] = ()) -> Relevances:
        if self._walked is None:
            return super().relevance(seeds, layers)
        walk, passed = self._walked
        self._walked = None
        cut = self.session.cut
        starts = cut.starts if walk.stop == cut.feature else [cut.feature]
        parts = [seed if isinstance(seed, (list, tuple)) else [seed] for seed in seeds]
        given: dict[int, list[Tensor]] = {}
        for place, index in enumerate(starts):
            many = [part[place] for part in parts]
            if all(one is not None for one in many):
                # One value may be several of the outputs.
                given[index] = [a + b for a, b in zip(given[index], many, strict=True)] if index in given else many
        taps = {name: self._standing_for(name) for name in layers}
        with neutral_modes():
            found, tapped = walk.relevance(passed, given, frozenset(taps.values()))
        missing = [name for name, index in taps.items() if index not in tapped]
        if missing:
            raise ValueError(f"no relevance passes layer '{missing[0]}' on its way to '{self.layer}'")
        return found, {name: tapped[index] for name, index in taps.items()}

    def _standing_for(self, layer: str) -> int:
        """Index of a layer's value; that of the batch norm folded into it where it is no longer computed."""
        program = self.session.cut.program
        index, _ = find_layer(program, self.session.bound.model, layer, len(self.features.shape) - 2, True)
        source = program.nodes[index]
        for node in program.nodes[index + 1 :]:
            weight = node.args[1] if len(node.args) > 1 else None
            made = program.nodes[weight.index] if isinstance(weight, Ref) else None
            alike = node.target == source.target and node.args[0] == source.args[0]
            if made is not None and made.kind == "folded" and alike and made.target.weight == source.args[1].index:
                return node.index
        return index

    def gradients(self, targets: Targets) -> Tensor:
        if self._affine is not None:
            return self._closed_form(self._affine, targets)
        if self._graph is None:
            raise RuntimeError(f"layer '{self.layer}' was passed without recording gradients")
        return self._graph.gradients(targets)

    def full_gradients(self, targets: Targets, visits: Sequence[Visit]) -> Tensor:
        if not isinstance(self._graph, BiasedGraph):
            return super().full_gradients(targets, visits)
        return self._graph.full_gradients(targets, visits)

    def _closed_form(self, affine: AffineHead, targets: Targets) -> Tensor:
        cut, leaves = self.session.cut, self.session.leaves
        if targets.indices is not None:
            return affine.gradients(targets.indices, cut.run_probe, leaves, self.features)
        (slopes,) = score_slopes(self.output, targets, None, self.features.shape[0], self.layer, _leaf)
        return affine.from_scores(slopes, leaves, self.features)

    def reference(self, features: Tensor) -> Reference:
        if self.session.cut.bypass and features.shape[0] != self.features.shape[0]:
            features = features.expand(self.features.shape)
        rows = features.shape[0]
        features = features.to(self.features.dtype)
        if self._recorded is None:
            index = torch.arange(rows, device=features.device)
            return Reference(features, self.head(features, index))
        found = self._record(features, rows)
        return Reference(features, found.output, found)

    def _record(self, features: Tensor, rows: int) -> Recorded:
        with neutral_modes():
            return self.session.cut.walk().record(features, self.session.leaves | self._entering, rows)

    def multipliers(self, targets: Targets, reference: Reference) -> Tensor:
        if self._affine is not None:
            if targets.indices is None:
                self._seeds(targets, None, reference)  # a head that is affine does not make the callable so
            return self._closed_form(self._affine, targets)
        if self._walk is not None:
            return self._by_parts(self._walk, targets, reference)
        if self._recorded is None:
            raise RuntimeError(f"layer '{self.layer}' was passed without recording values for multipliers")
        walk = self.session.cut.walk()
        recorded = reference.recorded
        # A kept reference may stem from a call that took the closed form, and one image may not do for this batch.
        if recorded is None or not one_for_all(self._recorded, recorded):
            recorded = self._record(reference.features.expand(self.features.shape), self.features.shape[0])
        found = []
        with neutral_modes():
            for column in columns_of(targets):
                seeds = self._seeds(targets, column, reference)
                found.append(walk.multipliers(self._recorded, recorded, seeds))
        return torch.stack(found, dim=1) if targets.several else found[0]

    def _by_parts(self, walk: SignedWalk, targets: Targets, reference: Reference) -> Tensor:
        with neutral_modes():
            base = reference.features.expand(self.features.shape)
            passed = walk.propagate(self.features, base, self.session.leaves | self._entering)
            seeds = [self._seeds(targets, column, reference) for column in columns_of(targets)]
            found = [walk.multipliers(passed, one) for one in seeds]
        return torch.stack(found, dim=1) if targets.several else found[0]

    def _seeds(self, targets: Targets, column: int | None, reference: Reference) -> dict[int, Tensor]:
        """Multipliers at the outputs: slopes of the score, which must be the same in both passes."""
        batch = self.features.shape[0]
        if targets.indices is not None:
            scores = class_scores(self.output)
            places = torch.utils._pytree.tree_leaves(self.output)
            leaf = self.session.cut.program.outputs[next(i for i, one in enumerate(places) if one is scores)]
            chosen = targets.indices if column is None else targets.indices[:, column]
            return {leaf.index: torch.zeros_like(scores).scatter_(1, chosen.unsqueeze(1), 1)}
        here = score_slopes(self.output, targets, column, batch, self.layer, _leaf)
        there = score_slopes(reference.output, targets, column, batch, self.layer, lambda t: _leaf(_rows(t, batch)))
        seeds: dict[int, Tensor] = {}
        for leaf, slope, other in zip(self.session.cut.program.outputs, here, there, strict=True):
            if slope is None:
                continue
            if not tracing() and not torch.allclose(slope, other):
                raise ValueError(
                    "DeepLIFT multipliers need a target that is linear in the model's output, such as a class or a "
                    "difference of classes; this callable's slope changes between image and reference. Put what is not "
                    "linear into the model: it is then part of the network"
                )
            if isinstance(leaf, Ref):
                seeds[leaf.index] = slope
        return seeds

    def head(self, features: Tensor, rows: Tensor) -> Any:
        values: dict[int, Any] = self.session.leaves | {
            index: value.index_select(0, rows) if index in self.session.cut.bypass else value
            for index, value in self._entering.items()
        }
        for index in self.session.cut.sizes:
            values[index] = features.shape[0]
        values[self.session.cut.feature] = features.to(self.features.dtype)
        return self.session._run_head(values)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _rows(tensor: Tensor, batch: int) -> Tensor:
    return tensor.expand(batch, *tensor.shape[1:]) if tensor.ndim and tensor.shape[0] == 1 else tensor
