"""SFAM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastcam import ops
from fastcam._dtypes import accumulation_dtype

from ._method import CamOptions, PairMethod, Shares, check_flags

__all__ = ["METHOD", "SfamOptions", "among", "sfam"]


@dataclass(frozen=True)
class SfamOptions(CamOptions):
    """Those of `CamOptions`, and

    metric               "cosine" · "euclidean": minus the squared distance
    euclidean_term       what an embedding channel contributes under "euclidean": "neg_sq" -(u - v)^2 · "cross" 2 u v ·
                         "inverse" 1 / (1 + |u - v|)
    weighting            "minmax" over channels, ones where constant · "ratio" c / |sum c| · "raw" c
    embedding            where embeddings come from: "output", the model's output (B, D) · a callable that takes them,
                         as they are, from an output that holds several tensors · "avg", "max", "gem": the layer's
                         features, pooled
    gem_power            exponent of embedding="gem", (mean A^p)^(1/p)
    normalize_embedding  compare vectors of one length (matters for "euclidean" only) · None: where the network ends in
                         an L2 normalisation
    dissimilarity        weigh channels by what they contribute to the difference instead: c -> -c. Not in the paper
    """

    metric: Literal["cosine", "euclidean"] = "cosine"
    euclidean_term: Literal["neg_sq", "cross", "inverse"] = "neg_sq"
    weighting: Literal["minmax", "ratio", "raw"] = "minmax"
    embedding: Literal["output", "avg", "max", "gem"] | Callable[[Any], Tensor] = "output"
    gem_power: float = 3.0
    normalize_embedding: bool | None = None
    dissimilarity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(dissimilarity=self.dissimilarity)
        if self.normalize_embedding is not None:
            check_flags(normalize_embedding=self.normalize_embedding)
        if self.eigen_smooth:
            raise ValueError("sfam takes no eigen_smooth: its maps are sums of weighted channels")
        for name, known in (
            ("metric", ("cosine", "euclidean")),
            ("euclidean_term", ("neg_sq", "cross", "inverse")),
            ("weighting", ("minmax", "ratio", "raw")),
            ("embedding", ("output", "avg", "max", "gem")),
        ):
            value = getattr(self, name)
            if value not in known and not (name == "embedding" and callable(value)):
                more = " or a callable" if name == "embedding" else ""
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}{more}; got {value!r}")
        if not isinstance(self.gem_power, (int, float)) or not 0 < self.gem_power < math.inf:
            raise ValueError(f"gem_power must be a positive number; got {self.gem_power!r}")
        never = "inverse" if self.dissimilarity else "neg_sq"
        if (self.metric, self.euclidean_term) == ("euclidean", never) and self.weighting != "minmax" and self.relu:
            raise ValueError(
                f"weighting={self.weighting!r} of the {never!r} term is never positive here: with relu=True maps of "
                "features that are not negative are all zero; use weighting='minmax' or relu=False"
            )


def sfam(first: Tensor, second: Tensor, options: SfamOptions, length: float | None = None) -> Shares:
    """The similarity of two embeddings, split over their channels; the same weights serve the maps of both images.

    u = z_a, v = z_b;   c_d = u_d v_d / (|u| |v|)  (cosine)   or   -(u_d - v_d)^2  (euclidean);   t = sum_d c_d
    r = c / |t|  (c where t = 0);   w = (r - min r) / (max r - min r);   alpha_k = sum_ij d<w, z> / d A_k[i,j]
    M_a = relu(sum_k alpha_a,k A_a,k), M_b likewise

    Norms are constants and w is one too: alpha is w itself for pooled features, w P for a linear projection P behind
    them, and a local linearisation for any other head. The embedding taken is the one before a final L2 normalisation.
    The map says which places hold the channels that contributed most to the similarity: also where it is negative,
    never "this differs"; `dissimilarity=True` ranks the other way round.

    Shapes: embeddings (B, D), of which one may be (1, D); c and w (B, D), t (B,); alpha (B, K); maps (B, *spatial).
    Undefined cases: a zero embedding has c = 0 (norms are at least 1e-12); equal contributions weigh 1 each under
    "minmax" and are flagged in `extra["degenerate"]`.
    Source: Liao et al., SFAM, arXiv 2506.01636, of which the abstract is known: contributions of channels to cosine or
    Euclidean similarity of two embeddings, the weighted sum of the last feature maps. Cosine: follows the authors'
    earlier public code (product, division by |t|, min-max, pull-back, ReLU). Euclidean: reconstructed.
    """
    term = "cosine" if options.metric == "cosine" else options.euclidean_term
    if length is not None and options.metric == "euclidean":
        first, second = length * _unit_rows(first), length * _unit_rows(second)
    shares = _split(first, second, term, options)
    if term in ("cosine", "neg_sq"):
        return shares
    wide = accumulation_dtype(first.dtype)
    return dataclasses.replace(shares, score=-(first.to(wide) - second.to(wide)).square().sum(1))


def _split(first: Tensor, second: Tensor, term: str, options: SfamOptions) -> Shares:
    """The op by its term; `score` is the sum of the contributions, those to similarity."""
    contributions, weights, total = ops.similarity_weights(
        first, second, term, options.weighting, dissimilarity=options.dissimilarity
    )
    return Shares(contributions, weights, -total if options.dissimilarity else total)


def _unit_rows(embeddings: Tensor) -> Tensor:
    """Rows of length 1 in the accumulation dtype; zero rows stay zero."""
    return functional.normalize(embeddings.to(accumulation_dtype(embeddings.dtype)), eps=1e-12)


def among(first: Tensor, others: Tensor, chosen: Tensor, options: SfamOptions, length: float | None = None) -> Shares:
    """One embedding against the mean of several.

    cosine: c_d = mean_j u_d m_jd with u and m_j of length 1;   euclidean: the pair of u and the mean of the m_j

    first (B, D), others (B, S, D), chosen (B, S) bool, at least one in each row
    """
    keep = chosen.unsqueeze(-1).to(accumulation_dtype(others.dtype))
    unit = options.metric == "cosine" or length is not None
    rows = _unit_rows(others.flatten(0, 1)).unflatten(0, others.shape[:2]) if unit else others.to(keep.dtype)
    if options.metric == "euclidean" and length is not None:
        first, rows = length * _unit_rows(first), length * rows
    middle = torch.where(chosen.unsqueeze(-1), rows, 0).sum(1) / keep.sum(1)
    if options.metric == "cosine":
        return _split(_unit_rows(first), middle, "dot", options)
    return sfam(first.to(middle.dtype), middle, options)


METHOD = PairMethod(
    "sfam",
    "where two images hold the channels that make their embeddings similar",
    "arXiv 2506.01636, abstract",
    sfam,
    among,
    options=SfamOptions,
    certainty="cosine follows the authors' earlier public code; euclidean terms are reconstructed",
)
