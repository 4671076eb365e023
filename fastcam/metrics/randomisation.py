"""Whether maps depend on what the network has learnt: similarity while its layers are randomised one by one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcam._network import check_images
from fastcam.explainer import Explainer
from fastcam.methods._perturb import check_seed
from fastcam.program.state import exclusive, unwrap
from fastcam.program.targets import TargetSpec

from .agreement import rank_correlation
from .sensitivity import Explain, maps_of

__all__ = ["Randomisation", "cascading_randomisation"]


@dataclass(frozen=True, eq=False)
class Randomisation:
    """Similarity to the trained network's maps, after each of L steps.

    layers      the layer randomised at each step, on top of all before it
    similarity  (L, B) float64, Spearman's correlation; NaN where a map is constant
    """

    layers: tuple[str, ...]
    similarity: Tensor


def cascading_randomisation(
    model: nn.Module,
    images: Tensor,
    targets: TargetSpec = None,
    *,
    method: str | Callable[[nn.Module], Explain] = "grad_cam",
    order: Literal["top_down", "bottom_up"] = "top_down",
    init: Literal["reset", "xavier"] = "reset",
    magnitude: bool = False,
    seed: int = 0,
    **options: Any,
) -> Randomisation:
    """Rank correlation of maps with the trained network's, layer by layer from the output down.

    model      stays as it is: a copy is randomised
    images     (B, C, *spatial) as the model expects them
    targets    as of `fastcam.attribute`; classes found with the trained weights are kept throughout
    method     a method's name · a callable that binds a model: model -> explain(images, targets) -> maps
    order      "top_down": modules with parameters of their own from the last defined to the first · "bottom_up"
    init       "reset": each module's own initialisation (a module without one: normal, of its parameters' own standard
               deviation) · "xavier": weights Xavier-uniform, all of one dimension uniform in [0, 1), as Attribution
               Equilibrium's release
    magnitude  compare |R| instead of R
    seed       of the weights; torch's global state is put back
    options    of `fastcam.Explainer`, where `method` is a name; maps are compared as they are before normalisation

    Buffers, such as the statistics of batch norms, stay. Lower is better, towards the end most of all; a method that
    does not fall there shows the image rather than the network. Order of definition is taken for order of execution.
    Raises ValueError for an unknown order or init, and for a model without parameters; TypeError for options beside a
    callable.
    Cost: L + 1 explanations of the batch and a copy of the model.
    Source: Adebayo et al. 2018.
    """
    check_images(images)
    check_seed(seed)
    if order not in ("top_down", "bottom_up"):
        raise ValueError(f"order must be 'top_down' or 'bottom_up'; got {order!r}")
    if init not in ("reset", "xavier"):
        raise ValueError(f"init must be 'reset' or 'xavier'; got {init!r}")
    if not isinstance(method, str) and options:
        raise TypeError(f"{', '.join(options)} go with a method's name; a callable binds its own options")
    with exclusive, torch.inference_mode(False):  # or the twin's weights could take part in no gradient
        twin = copy.deepcopy(unwrap(model))
    layers = [(name, part) for name, part in twin.named_modules() if any(True for _ in part.parameters(recurse=False))]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no parameters to randomise")
    explain = Explainer(twin, method, normalize=False, **options) if isinstance(method, str) else method(twin)
    first = explain(images, targets)
    own, kept = _compared(first, images, magnitude), getattr(first, "targets", targets)
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, part in layers if order == "bottom_up" else reversed(layers):
            _randomise(part, init)
            found.append(rank_correlation(own, _compared(explain(images, kept), images, magnitude)))
    names = tuple(name for name, _ in layers)
    return Randomisation(names if order == "bottom_up" else names[::-1], torch.stack(found))


def _compared(explained: Any, images: Tensor, magnitude: bool) -> Tensor:
    maps = maps_of(explained, len(images)).flatten(1)
    return maps.abs() if magnitude else maps


@torch.inference_mode(False)
@torch.no_grad()
def _randomise(part: nn.Module, init: str) -> None:
    """New values for the module's own parameters, drawn on the CPU so that devices agree."""
    if init == "xavier":
        for value in part.parameters(recurse=False):
            if value.ndim > 1:
                receptive = math.prod(value.shape[2:])
                bound = math.sqrt(6 / ((value.shape[0] + value.shape[1]) * receptive))
                value.copy_(torch.rand(value.shape) * (2 * bound) - bound)
            else:
                value.copy_(torch.rand(value.shape))
        return
    reset = getattr(part, "reset_parameters", None)
    if callable(reset):
        device = next(part.parameters(recurse=False)).device
        buffers = {name: value.clone() for name, value in part.named_buffers(recurse=False)}
        part.cpu()
        reset()
        part.to(device)
        for name, value in buffers.items():
            part.get_buffer(name).copy_(value)
        return
    for value in part.parameters(recurse=False):
        value.copy_(torch.randn(value.shape) * value.std(correction=0).cpu() + value.mean().cpu())
