"""SHAP-CAM: SHAP values of feature maps, exact or sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcam import ops
from fastcam._dtypes import accumulation_dtype

from ._maps import planar
from ._method import CamOptions, Evidence, Method, Passage
from ._perturb import check_count, check_seed, perturbed_scores

__all__ = ["METHOD", "ShapCamOptions", "shap_cam"]

#: More maps are never enumerated: 2^20 coalitions an image are about a million passes through the head.
_MOST_EXACT = 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ShapCamOptions(CamOptions):
    """As `CamOptions`, and

    reference       what stands in for an absent map: a number, or a tensor of features that broadcasts to (B, K,
                    *spatial), after `reshape_transform` where there is one
    exact           None: all coalitions up to `max_exact_maps` maps, else a sample of orders · True: all coalitions, or
                    an error · False: a sample of orders. Closed forms, which are exact and free, are used in any case
    max_exact_maps  0 to 20: 2^maps coalitions are evaluated for each image
    n_orders        sampled: orders in which the maps are put in place, the same for all images
    antithetic      sampled: orders come in pairs, one the other's reverse; an odd `n_orders` is then rounded up
    seed            sampled: of the orders
    chunk           coalitions in one pass through the head, those of several images together where they are few
    progress        called after each pass through the head with the coalitions done and their total over all images
    """

    reference: float | Tensor = 0.0
    exact: bool | None = None
    max_exact_maps: int = 16
    n_orders: int = 32
    antithetic: bool = True
    seed: int = 0
    chunk: int = 64
    progress: Progress | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reference, bool) or not isinstance(self.reference, (int, float, Tensor)):
            raise TypeError(
                f"reference must be a number or a tensor of layer features; got {type(self.reference).__name__}"
            )
        if not bool(torch.as_tensor(self.reference).isfinite().all()):
            raise ValueError("the reference is not finite: it holds NaN or infinity")
        if self.exact not in (None, True, False):
            raise ValueError(f"exact must be None, True or False; got {self.exact!r}")
        if not 0 <= self.max_exact_maps <= _MOST_EXACT:
            raise ValueError(f"max_exact_maps must be 0 to {_MOST_EXACT}; got {self.max_exact_maps!r}")
        check_count("n_orders", self.n_orders)
        check_count("chunk", self.chunk)
        check_seed(self.seed)
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be a callable (done, total); got {type(self.progress).__name__}")
        if self.antithetic and self.n_orders % 2:
            object.__setattr__(self, "n_orders", self.n_orders + 1)  # what is used is what `Attribution.options` says


def shap_cam(passage: Passage, options: ShapCamOptions) -> Evidence:
    """Channels weighted by their SHAP values in the game "which feature maps are present".

    v(S) = y(maps in S as observed, the others as in the reference);    M = relu(sum_k phi_k A_k)
    phi_k = sum over S without k of |S|! (K - |S| - 1)! / K! (v(S + k) - v(S));    sum_k phi_k = y(A) - y(R)

    closed form  heads affine in the features, class indices as targets: phi_k = sum_ij G_k (A_k - R_k)
    exact        all 2^K coalitions
    sampled      the mean over orders pi of v(pi_1..pi_t) - v(pi_1..pi_t-1), the gain of map pi_t. An order and its
                 reverse form one unit (`antithetic`), whose mean is exact where no more than two maps interact; the sum
                 over the maps is exact for any number of orders

    A map equal to its reference has exactly 0 and is never varied. Sums run in float64. The score explained is the
    model's output (let it be logits) unless a callable target says otherwise.

    `Attribution.weights` is phi, `delta` is sum_k phi_k - (y(A) - y(R)); `extra["standard_error"]` is that of the mean
    over units, shaped as phi: 0 where phi is exact, NaN where there is one unit; `extra["estimator"]` says which of the
    three it was.

    Shapes: A (B, K, *spatial), phi (B, K), M (B, *spatial); T targets add an axis after B and share all passes.
    Errors: ValueError for a reference that does not broadcast to the features, or sits on another device, and where
    `exact` is asked for more maps than `max_exact_maps`; it names the way out.
    Cost: the forward pass; closed form: one more of the head, on one map where the reference is one for all images;
    else, for P maps that differ from their reference, 2^P - 1 or n_orders (P - 1) + 1 rows through the head for each
    image, none through the trunk. Networks that are explained through a hook pay whole passes instead.
    Source: the game: Jung and Oh, ICCV 2021, arXiv 2102.05228, sec. 3; the values: Lundberg and Lee, arXiv 1705.07874,
    eq. 8; orders and their reverses: Mitchell et al., arXiv 2104.12199.
    """
    features = passage.features
    base = _as_features(options.reference, features)
    channels = features.shape[1]
    closed = passage.linear and passage.targets.indices is not None
    enumerated = channels <= options.max_exact_maps if options.exact is None else options.exact
    if enumerated and not closed and channels > options.max_exact_maps:
        raise ValueError(
            f"exact=True takes 2^{channels} passes through the head for the {channels} maps of layer "
            f"'{passage.layer}', more than max_exact_maps={options.max_exact_maps} allows (the most is {_MOST_EXACT}); "
            "pass exact=False to sample n_orders orders instead"
        )
    full = passage.scores().double()
    empty = _reference_scores(passage, base, options, closed).double()
    if closed:
        values, error = _closed(passage, base), None
    else:
        game = _Game(passage, base, empty, full, options.chunk, options.progress)
        if enumerated:
            values, error = _exact(game), None
        else:
            orders = _orders(channels, options.n_orders, options.antithetic, options.seed)
            values, error = _sampled(game, orders.to(features.device))
    kind = accumulation_dtype(features.dtype)
    return Evidence(
        weights=values.to(kind),
        delta=(values.sum(-1) - (full - empty)).to(kind),
        extra={
            "standard_error": torch.zeros_like(values, dtype=kind) if error is None else error.to(kind),
            "estimator": "closed form" if closed else "exact" if enumerated else "sampled",
        },
    )


def _as_features(reference: float | Tensor, features: Tensor) -> Tensor:
    """(1 or B, K, *spatial) reference, in the features' dtype; numbers and vectors as views."""
    if not isinstance(reference, Tensor):
        return features.new_full((), float(reference)).expand(1, *features.shape[1:])
    shape, wanted = tuple(reference.shape), tuple(features.shape)
    padded = (1,) * (len(wanted) - len(shape)) + shape
    if len(padded) != len(wanted) or any(n not in (1, size) for n, size in zip(padded, wanted, strict=True)):
        raise ValueError(f"a reference must broadcast to the layer's features, {wanted}; got {shape}")
    if reference.device != features.device:
        raise ValueError(f"the reference is on {reference.device} and the features are on {features.device}")
    return reference.detach().to(features.dtype).reshape(padded).expand(padded[0], *wanted[1:])


def _reference_scores(passage: Passage, base: Tensor, options: ShapCamOptions, closed: bool) -> Tensor:
    """y(R), (B,) or (B, T)."""
    # An affine head reads nothing of the image but the features, so that one row does for all; elsewhere what passes
    # the layer by, or what a reshape_transform drops, is each image's own.
    batch = len(passage.features)
    count = len(base) if closed and not passage.rearranged else batch
    rows = torch.arange(count, device=base.device)
    return passage.scores(passage.output_with(base.expand(count, *base.shape[1:]).contiguous(), rows))


def _closed(passage: Passage, base: Tensor) -> Tensor:
    features, flat, slopes = (planar(x, passage.spatial_rank) for x in (passage.features, base, passage.gradients()))
    return ops.channel_weights(features, slopes, flat, mode="sum").double()


class _Game:
    """Which maps are present, and what the score then is.

    players  (P,) the maps that differ from their reference in some image: the only ones that are varied
    empty    (B,) or (B, T) float64 scores with no map present, `full` with all
    """

    def __init__(
        self, passage: Passage, base: Tensor, empty: Tensor, full: Tensor, chunk: int, progress: Progress | None = None
    ):
        self.passage = passage
        self.base = base
        self.empty = empty
        self.full = full
        self.chunk = chunk
        self._progress = progress
        self._done = self._total = 0
        self._same = (passage.features == base).flatten(2).all(-1)
        self.players = (~self._same).any(0).nonzero().squeeze(1)

    def announce(self, coalitions: int) -> None:
        """How many coalitions an image will be asked for, for the progress callback."""
        self._done, self._total = 0, coalitions * len(self.passage.features)

    def gains(self, masks: Tensor) -> Tensor:
        """v(S) - v(none), (B, n) or (B, T, n) float64, of coalitions of the players, masks (n, P) bool."""
        features = self.passage.features
        batch, channels = features.shape[:2]
        count = len(masks)
        present = torch.zeros((count, channels), dtype=torch.bool, device=features.device)
        present[:, self.players] = masks
        present = present.reshape(count, channels, *(1,) * (features.ndim - 2))

        def run(start: int, size: int) -> Any:
            pair = torch.arange(start, start + size, device=features.device)
            rows = pair // count
            base = self.base if len(self.base) == 1 else self.base[rows]
            output = self.passage.output_with(torch.where(present[pair % count], features[rows], base), rows)
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self._total)
            return output

        scores = perturbed_scores(run, self.passage.targets, batch, count, self.chunk, self.passage.layer)
        return scores.double() - self.empty.unsqueeze(-1)

    def of_maps(self, values: Tensor) -> Tensor:
        """(..., K) from (..., P) values of the players; 0 for maps equal to their reference."""
        found = values.new_zeros((*values.shape[:-1], self._same.shape[1]))
        found[..., self.players] = values
        return found.masked_fill(self._same if found.ndim == 2 else self._same.unsqueeze(1), 0)


def _exact(game: _Game) -> Tensor:
    """(B[, T], K) SHAP values from all coalitions of the P players."""
    count = len(game.players)
    if count == 0:
        return game.of_maps(game.full.new_zeros((*game.full.shape, 0)))
    # Weight of a coalition of s players in the value of a player inside it, and of one outside.
    device = game.players.device
    inside = torch.tensor([0.0] + [1 / (s * math.comb(count, s)) for s in range(1, count + 1)], dtype=torch.float64)
    outside = torch.tensor([1 / ((count - s) * math.comb(count, s)) for s in range(count)] + [0.0], dtype=torch.float64)
    inside, outside = inside.to(device), outside.to(device)
    # The weights of a player sum to 0, so scores may be counted from v(none); that of all players is known.
    values = ((game.full - game.empty) / count).unsqueeze(-1).repeat_interleave(count, -1)
    game.announce(2**count - 2)
    bits = torch.arange(count, device=device)
    for start in range(1, 2**count - 1, game.chunk):
        numbers = torch.arange(start, min(start + game.chunk, 2**count - 1), device=device)
        masks = (numbers.unsqueeze(1) >> bits) & 1 == 1
        size = masks.sum(1, keepdim=True)
        values = values + game.gains(masks) @ torch.where(masks, inside[size], -outside[size])
    return game.of_maps(values)


def _orders(channels: int, count: int, antithetic: bool, seed: int) -> Tensor:
    """(units, orders of a unit, K) orders of the maps: an order and its reverse, or one order."""
    generator = torch.Generator().manual_seed(seed)
    units = (count + 1) // 2 if antithetic else count
    drawn = torch.stack([torch.randperm(channels, generator=generator) for _ in range(units)]).unsqueeze(1)
    return torch.cat([drawn, drawn.flip(-1)], dim=1) if antithetic else drawn


def _sampled(game: _Game, orders: Tensor) -> tuple[Tensor, Tensor]:
    """(B[, T], K) means over units of orders (units, S, K), and the standard errors of these means."""
    units = len(orders)
    done, mean, spread = 0, game.full.new_zeros(()), game.full.new_zeros(())
    for found in _unit_values(game, orders):
        # Means and sums of squares of parts merged without cancellation (Chan, Golub and LeVeque 1983, eq. 1.5).
        size = found.shape[-2]
        own = found.mean(-2)
        shift = own - mean
        spread = spread + (found - own.unsqueeze(-2)).square().sum(-2)
        spread = spread + shift.square() * (done * size / (done + size))
        mean = mean + shift * (size / (done + size))
        done += size
    error = (spread / (units - 1) / units).sqrt() if units > 1 else torch.full_like(mean, torch.nan)
    return game.of_maps(mean), game.of_maps(error)


def _unit_values(game: _Game, orders: Tensor) -> Iterator[Tensor]:
    """(B[, T], units, P) gains of the players, means over the orders of a unit, for some units at a time."""
    units, several, _ = orders.shape
    count = len(game.players)
    # A map that is no player changes nothing where it is put in place: the orders of the players are what matters.
    ranks = orders.argsort(-1)[..., game.players].argsort(-1).argsort(-1)
    steps = torch.arange(1, max(count, 1), device=orders.device)
    game.announce(units * several * len(steps))
    whole = (game.full - game.empty)[..., None, None, None]
    for part in ranks.split(max(1, game.chunk // max(1, several * len(steps)))):
        ends = whole.expand(*whole.shape[:-3], *part.shape[:2], 1)
        path = [torch.zeros_like(ends), ends]
        if len(steps):
            masks = part.unsqueeze(2) < steps.unsqueeze(1)
            path.insert(1, game.gains(masks.flatten(0, 2)).unflatten(-1, masks.shape[:3]))
        gains = torch.cat(path, -1).diff(dim=-1)
        places = part.expand(*gains.shape[:-1], count)
        yield gains.gather(-1, places).mean(-2)


METHOD = Method(
    "shap_cam",
    "channels weighted by their SHAP value, from all coalitions of maps or a sample of orders",
    "arXiv 2102.05228, sec. 3; arXiv 1705.07874, eq. 8",
    shap_cam,
    needs="closed_form",
    options=ShapCamOptions,
)
