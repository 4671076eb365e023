"""The metrics of `evaluate` that explain again: noisy copies, randomised networks, SHAP values of feature maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcam.explainer import Explainer

from .agreement import shap_agreement
from .randomisation import cascading_randomisation
from .sensitivity import max_sensitivity

if TYPE_CHECKING:
    from .evaluate import Batch, Found, Settings

__all__ = ["randomisation", "sensitivity", "shap"]


def sensitivity(model: Any, batch: Batch, settings: Settings) -> Found:
    """`max_sensitivity` of each map by itself."""
    explain, options = settings.bound(model), settings.of("radius", "samples", "seed")
    return {"max_sensitivity": _each(batch, lambda t: max_sensitivity(explain, batch.images, t, **options))}, {}


def randomisation(model: Any, batch: Batch, settings: Settings) -> Found:
    """`cascading_randomisation` of each map by itself, its mean over the steps at which neither map is constant."""

    def similarity(targets: Any) -> Tensor:
        steps = cascading_randomisation(model, batch.images, targets, method=settings.bound, seed=settings.seed)
        return steps.similarity.nanmean(0)

    return {"randomisation": _each(batch, similarity)}, {}


def shap(model: Any, batch: Batch, settings: Settings) -> Found:
    """`shap_agreement` of the channel coefficients with those of `shap_cam` at the same layer."""
    explain = settings.bound(model)
    found = explain(batch.images, batch.targets)
    weights = getattr(found, "weights", None)
    if weights is None:
        name = getattr(found, "method", type(found).__name__)
        raise ValueError(f"metric 'shap_agreement' compares channel coefficients; method '{name}' gives none")
    options = {"layer": explain.layer, "reshape_transform": found.options["reshape_transform"], "seed": settings.seed}
    values = Explainer(model, "shap_cam", chunk=settings.chunk, on_nonfinite="mask", **options)
    exact = values(batch.images, batch.targets).weights
    assert exact is not None
    return {"shap_agreement": _known(batch, shap_agreement(weights, exact.to(weights)))}, {}


def _each(batch: Batch, measure: Callable[[Any], Tensor]) -> Tensor:
    """(B,) or (B, T): `measure` of each column of targets."""
    targets = batch.targets
    if isinstance(targets, Tensor) and targets.ndim == 2:
        return _known(batch, torch.stack([measure(column) for column in targets.unbind(1)], dim=1))
    return _known(batch, measure(targets))


def _known(batch: Batch, found: Tensor) -> Tensor:
    """NaN where there is no map."""
    return torch.where(batch.maps.flatten(found.ndim).isnan().any(-1), torch.nan, found)
