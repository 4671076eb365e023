"""Many metrics over many batches: every value, their means and errors, and mean curves."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcam.explainer import Explainer

from . import explaining
from .accumulate import Mean
from .agreement import sparsity
from .confidence import confidence
from .curves import Curve, insertion_deletion, most_relevant_first
from .localisation import average_precision, energy_pointing, localisation_iou, outside_inside_ratio, pointing_game
from .road import both_curves, combined

__all__ = ["METRICS", "Batch", "Evaluation", "Settings", "evaluate"]


class Batch(NamedTuple):
    """Images with their maps: what `evaluate` takes in.

    images   (B, C, *spatial) as the model expects them
    maps     (B, *spatial) or (B, T, *spatial)
    targets  (B,) or (B, T) class indices
    masks    bool, of the maps' shape, True on the target's object; None where no metric asks for it
    ids      B names; None: numbers
    """

    images: Tensor
    maps: Tensor
    targets: Any
    masks: Tensor | None = None
    ids: Sequence[str] | None = None


@dataclass(frozen=True)
class Settings:
    """Options of the metrics, under the names they have there; `fractions` are those of ROAD.

    method  how the maps were made, for metrics that explain again: a method's name, or model -> `Explainer`
    """

    output: Any = "probability"
    steps: int = 50
    baseline: str | Tensor = "mean"
    chunk: int = 32
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    seed: int = 0
    fractions: Sequence[float] = tuple(n / 10 for n in range(1, 10))
    noise: float = 0.01
    tolerance: float = 0
    threshold: float = 0.5
    radius: float = 0.2
    samples: int = 10
    method: str | Callable[[nn.Module], Explainer] | None = None

    def bound(self, model: nn.Module) -> Any:
        """The explainer of `model` by `method`."""
        assert self.method is not None
        return (
            Explainer(model, self.method, on_nonfinite="mask") if isinstance(self.method, str) else self.method(model)
        )

    def of(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


Found = tuple[dict[str, Tensor], dict[str, Curve]]
Family = Callable[[Any, Batch, Settings], Found]


def _confidence(model: Any, batch: Batch, settings: Settings) -> Found:
    found = confidence(model, batch.images, batch.maps, batch.targets, **settings.of("output", "chunk"))
    names = {"average_drop": "drop", "increase_in_confidence": "increase", "average_drop_in_deletion": "deletion_drop"}
    return {name: getattr(found, key) for name, key in names.items()}, {}


def _insertion_deletion(model: Any, batch: Batch, settings: Settings) -> Found:
    options = settings.of("steps", "baseline", "output", "chunk", "mean", "std", "seed")
    curves = insertion_deletion(model, batch.images, batch.maps, batch.targets, **options)
    names = "insertion", "deletion"
    found = {f"{name}_auc": curve.auc for name, curve in zip(names, curves, strict=True)}
    return found, dict(zip(names, curves, strict=True))


def _road(model: Any, batch: Batch, settings: Settings) -> Found:
    options = settings.of("fractions", "noise", "output", "chunk", "seed")
    most, least = both_curves(model, batch.images, batch.maps, batch.targets, **options)
    return {"road": combined(most, least)}, {"road, most relevant": most, "road, least relevant": least}


def _most_relevant_first(model: Any, batch: Batch, settings: Settings) -> Found:
    options = settings.of("output", "chunk", "mean", "std", "seed")
    curve = most_relevant_first(model, batch.images, batch.maps, batch.targets, **options)
    return {"most_relevant_first": curve.scores.mean(-1)}, {"most relevant first": curve}


def _localisation(_: Any, batch: Batch, settings: Settings) -> Found:
    assert batch.masks is not None
    if batch.images.ndim > 4 and settings.tolerance > 0:
        raise ValueError("the pointing game's tolerance is a distance in pictures and signals; in volumes it must be 0")
    maps, masks = _plane(batch.maps, batch), _plane(batch.masks, batch)
    return {
        "pointing_game": pointing_game(maps, masks, tolerance=settings.tolerance),
        "energy_pointing": energy_pointing(maps, masks),
        "outside_inside_ratio": outside_inside_ratio(maps, masks),
        "localisation_iou": localisation_iou(maps, masks, threshold=settings.threshold),
        "average_precision": average_precision(maps, masks),
    }, {}


def _sparsity(_: Any, batch: Batch, __: Settings) -> Found:
    return {"sparsity": sparsity(_plane(batch.maps, batch))}, {}


def _plane(values: Tensor, batch: Batch) -> Tensor:
    """(..., *spatial) as (..., H, W), which these metrics take: signals and volumes are one row of positions."""
    rank = batch.images.ndim - 2
    return values if rank == 2 else values.flatten(-rank).unsqueeze(-2)


class _Metric(NamedTuple):
    """How `evaluate` gets at a metric.

    family  computes it, with others
    better  "higher", "lower" or "neither"
    needs   "maps" · "masks" of the objects · "model" · "method", and the model
    """

    family: Family
    better: str
    needs: str


#: What `evaluate` knows, by name.
METRICS: dict[str, _Metric] = {
    "average_drop": _Metric(_confidence, "lower", "model"),
    "increase_in_confidence": _Metric(_confidence, "higher", "model"),
    "average_drop_in_deletion": _Metric(_confidence, "higher", "model"),
    "insertion_auc": _Metric(_insertion_deletion, "higher", "model"),
    "deletion_auc": _Metric(_insertion_deletion, "lower", "model"),
    "road": _Metric(_road, "higher", "model"),
    "most_relevant_first": _Metric(_most_relevant_first, "higher", "model"),
    "pointing_game": _Metric(_localisation, "higher", "masks"),
    "energy_pointing": _Metric(_localisation, "higher", "masks"),
    "outside_inside_ratio": _Metric(_localisation, "lower", "masks"),
    "localisation_iou": _Metric(_localisation, "higher", "masks"),
    "average_precision": _Metric(_localisation, "higher", "masks"),
    "sparsity": _Metric(_sparsity, "neither", "maps"),
    "max_sensitivity": _Metric(explaining.sensitivity, "lower", "method"),
    "randomisation": _Metric(explaining.randomisation, "lower", "method"),
    "shap_agreement": _Metric(explaining.shap, "higher", "method"),
}


@dataclass
class Evaluation:
    """What `evaluate` found.

    values    metric -> one float an item and target, in order, NaN where there is none
    ids       the items' names, once for each target
    curves    name -> (fractions, `Mean` over items of the scores)
    settings  options as used
    facts     whatever the caller says about model and maps
    """

    values: dict[str, list[float]]
    ids: list[str]
    curves: dict[str, tuple[list[float], Mean]]
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A metric each: mean, standard error and 95 % interval over what is finite, median over all but NaN, how many
        values took part, how many were not finite, and which direction is better."""
        found = []
        for name, numbers in self.values.items():
            values = torch.tensor(numbers, dtype=torch.float64)
            whole = Mean().update(values)
            low, high = (float(end) for end in whole.interval)
            known = values[~values.isnan()]
            found.append(
                {
                    "metric": name,
                    "better": METRICS[name].better,
                    "mean": float(whole.mean),
                    "standard_error": float(whole.standard_error),
                    "low": low,
                    "high": high,
                    "median": _median(known) if len(known) else math.nan,
                    "n": int(whole.count),
                    "left_out": int(whole.left_out),
                }
            )
        return found


def _median(values: Tensor) -> float:
    """Half way between the middle two, which may be infinite."""
    return sum(float(values.quantile(0.5, interpolation=side)) for side in ("lower", "higher")) / 2


def evaluate(
    model: nn.Module | None,
    batches: Iterable[Batch],
    metrics: Sequence[str],
    settings: Settings | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Runs `metrics` over `batches`.

        found = evaluate(model, [Batch(images, maps, targets)], ["insertion_auc", "deletion_auc", "road"])

    model     None where no metric needs one
    batches   of any sizes, read once; maps all for the same number of targets an image
    metrics   names of `METRICS`; metrics that share forward passes share them here
    settings  options of the metrics
    facts     kept in the result

    Raises ValueError for an unknown metric, one whose masks, model or method are missing, or no batch at all; and what
    the metrics raise. Cost: the metrics', and one host synchronisation a batch. Memory: one batch, and a float a metric
    and item.
    """
    settings = settings or Settings()
    chosen = _checked(metrics, model, settings)
    families = list(dict.fromkeys(METRICS[name].family for name in chosen))
    values: dict[str, list[float]] = {name: [] for name in chosen}
    curves: dict[str, tuple[Tensor, Mean]] = {}
    ids: list[str] = []
    for batch in batches:
        _check_masks(chosen, batch)
        found: dict[str, Tensor] = {}
        for family in families:
            numbers, lines = family(model, batch, settings)
            found |= numbers
            for name, curve in lines.items():
                mean = curves.setdefault(name, (curve.fractions, Mean()))[1]
                mean.update(curve.scores.flatten(0, -2))
        table = torch.stack([found[name].flatten().double() for name in chosen]).tolist()
        for name, row in zip(chosen, table, strict=True):
            values[name] += row
        names = batch.ids if batch.ids is not None else [str(len(ids) + i) for i in range(len(batch.images))]
        ids += [str(name) for name in names for _ in range(len(table[0]) // len(batch.images))]
    if not ids:
        raise ValueError("there is nothing to evaluate: no batch came")
    drawn = {name: (fractions.tolist(), mean) for name, (fractions, mean) in curves.items()}
    used = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    if isinstance(used["baseline"], Tensor):
        used["baseline"] = f"tensor {tuple(used['baseline'].shape)}"
    if callable(settings.method):
        del used["method"]  # which `facts` can say
    return Evaluation(values, ids, drawn, used, dict(facts or {}))


def _checked(metrics: Sequence[str], model: nn.Module | None, settings: Settings) -> list[str]:
    chosen = list(dict.fromkeys(metrics))
    if not chosen:
        raise ValueError(f"metrics names none; there are {', '.join(METRICS)}")
    for name in chosen:
        if name not in METRICS:
            close = difflib.get_close_matches(str(name), METRICS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"there is no metric {name!r} to evaluate; {hint}metrics: {', '.join(METRICS)}")
        needs = METRICS[name].needs
        if needs in ("model", "method") and model is None:
            what = "perturbs images" if needs == "model" else "explains again"
            raise ValueError(f"metric '{name}' {what} and needs the model the maps are for")
        if needs == "method" and settings.method is None:
            raise ValueError(f"metric '{name}' explains again: pass Settings(method=), how the maps were made")
    return chosen


def _check_masks(chosen: Sequence[str], batch: Batch) -> None:
    asking = next((name for name in chosen if METRICS[name].needs == "masks"), None)
    if asking is not None and batch.masks is None:
        raise ValueError(f"metric '{asking}' compares maps with masks of the objects; the batch has none")
    if asking is not None and batch.masks is not None and batch.masks.shape != batch.maps.shape:
        raise ValueError(
            f"masks of shape {tuple(batch.masks.shape)} do not fit maps of shape {tuple(batch.maps.shape)}: "
            "expected one for each map, of its size"
        )
