"""Explain function and pixel flipping for Quantus 0.6.0.

    from fastcam.adapters.quantus import PixelFlipping, explain   # was: from quantus import PixelFlipping, explain

    metric = PixelFlipping(features_in_step=224)
    kwargs = {"method": "lift_cam", "layer": "layer4"}
    scores = metric(model, x_batch, y_batch, explain_func=explain, explain_func_kwargs=kwargs)

`explain` serves every metric of Quantus, those that change the model's weights between calls included: weights are read
at each call. Explanation methods of Quantus' own, by its names and arguments, and names that are not here are Quantus'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcam.explainer import attribute
from fastcam.methods import methods
from fastcam.program.session import fastest

from ._peer import fallback, needing

with needing("quantus"):
    import quantus as _peer
    from quantus.functions.perturb_func import batch_baseline_replacement_by_indices
    from quantus.helpers import constants as _constants
    from quantus.helpers.model.pytorch_model import PyTorchModel as _PyTorchModel

__all__ = ["PixelFlipping", "explain"]

_explain = _peer.explain  # also while `accelerate` has another in its place
_QUANTUS_METHODS = {*_constants.AVAILABLE_XAI_METHODS_CAPTUM, *_constants.DEPRECATED_XAI_METHODS_CAPTUM}
_QUANTUS_ARGUMENTS = ("xai_lib", "attributor")

#: Perturbed images in one forward pass, and the numbers in them: what stays in a processor's cache.
_ROWS, _NUMBERS = 256, 1 << 19


def explain(
    model: nn.Module,
    inputs: np.ndarray | Tensor,
    targets: np.ndarray | Tensor | int | Sequence[int],
    *,
    method: str = "lift_cam",
    device: str | torch.device | None = None,
    **options: Any,
) -> np.ndarray:
    """Attributions (N, 1, *spatial) of a batch, exactly a `numpy.ndarray`, as every metric of Quantus takes them.

    inputs   (N, C, *spatial), array or tensor, prepared as the model expects; converted to the model's dtype
    targets  N class indices, or one for all
    method   any of `fastcam.methods()` that explains single images; Quantus' own ("Saliency", "LayerGradCam", ...), and
             calls with its `xai_lib` or `attributor`, run in Quantus
    device   where to compute; None: where the model is. Quantus passes it on where its caller gave one
    options  of `fastcam.attribute` (`layer`, `normalize`, `mean`, `std`, ...) and of the method

    Errors and cost are `fastcam.attribute`'s; a float32 result, float64 of a float64 model.
    """
    if method in _QUANTUS_METHODS or any(name in options for name in _QUANTUS_ARGUMENTS):
        asked = {} if method not in _QUANTUS_METHODS else {"method": method}
        found: np.ndarray = _explain(model, inputs, targets, device=device, **asked, **options)
        return found
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    images = torch.as_tensor(inputs)
    images = images.to(
        device=device if device is not None else parameter.device if parameter is not None else None,
        dtype=parameter.dtype if parameter is not None else torch.get_default_dtype(),
    )
    if not isinstance(targets, int):
        targets = torch.as_tensor(targets).reshape(-1).to(torch.int64)
        targets = targets.expand(len(images)) if len(targets) == 1 else targets
    maps = attribute(model, images, method, targets=targets, **options).maps
    return maps.unsqueeze(1).cpu().numpy()


def _explain_by_name(
    model: nn.Module, inputs: np.ndarray | Tensor, targets: np.ndarray | Tensor, **kwargs: Any
) -> np.ndarray:
    """What stands for `quantus.explain` while Quantus is accelerated: `explain` for fastcam's methods alone."""
    if kwargs.get("method") not in methods():
        own: np.ndarray = _explain(model, inputs, targets, **kwargs)
        return own
    for name in ("s_batch", "custom_batch"):  # SmoothMPRT passes on what no explanation reads
        kwargs.pop(name, None)
    return explain(model, inputs, targets, **kwargs)


class PixelFlipping(_peer.PixelFlipping):
    """Quantus' PixelFlipping with many steps in one forward pass, for perturbation by a constant.

    That is its default function with the baselines "black", "white" or a number; other functions and baselines run in
    Quantus, one step a pass.
    """

    def evaluate_batch(
        self, model: Any, x_batch: np.ndarray, y_batch: np.ndarray, a_batch: np.ndarray, **kwargs: Any
    ) -> Any:
        base = _baseline(self.perturb_func, x_batch)
        if base is None or np.ndim(y_batch) != 1:
            return super().evaluate_batch(model, x_batch, y_batch, a_batch, **kwargs)
        batch = len(x_batch)
        given = np.broadcast_to(a_batch, x_batch.shape).reshape(batch, -1)
        features = given.shape[1]
        steps = math.ceil(features / self.features_in_step)
        order = torch.from_numpy(np.argsort(-given, axis=1))
        when = torch.empty_like(order).scatter_(1, order, torch.arange(features).expand(batch, -1))
        when = when.div_(self.features_in_step, rounding_mode="floor")  # the step that flips each feature
        x = torch.from_numpy(np.ascontiguousarray(x_batch)).reshape(batch, -1)
        fill = torch.from_numpy(base).to(x.dtype).reshape(batch, 1)
        scores = np.empty((steps, batch))
        together = max(1, min(_ROWS, _NUMBERS // features) // batch)
        predict = _predicting(model, x_batch)
        for start in range(0, steps, together):
            at = torch.arange(start, min(start + together, steps)).reshape(-1, 1, 1)
            rows = torch.where(when <= at, fill, x).reshape(-1, *x_batch.shape[1:]).numpy()
            shaped = model.shape_input(rows, rows.shape, channel_first=True, batched=True)
            found = predict(shaped).reshape(len(at), batch, -1)
            scores[start : start + len(at)] = found[:, np.arange(batch), y_batch]
        curves = scores.T
        if self.return_auc_per_sample:
            # Quantus' own call is of a function that NumPy has dropped.
            return torch.trapezoid(torch.from_numpy(curves), dim=1).tolist()
        return curves.tolist()


def _predicting(model: Any, x_batch: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`model.predict`, by the network's fastest run where that is plain: the network, perhaps with a softmax behind."""
    network = model.model
    plain = type(model) is _PyTorchModel and type(network).__module__.split(".")[0] != "transformers"
    plain = plain and isinstance(network, nn.Module) and not network.training
    whole = model.get_softmax_arg_model() if plain and not model.model_predict_kwargs else None
    after = whole[1] if isinstance(whole, nn.Sequential) and whole is not network and len(whole) == 2 else None
    if whole is None or not (whole is network or (isinstance(after, nn.Softmax) and whole[0] is network)):
        return model.predict
    one = model.shape_input(x_batch[:1], x_batch[:1].shape, channel_first=True, batched=True)
    run = fastest(network, torch.Tensor(one).to(model.device))

    @torch.no_grad()
    def predict(rows: np.ndarray) -> np.ndarray:
        found = run(torch.Tensor(rows).to(model.device))
        return (found if after is None else after(found)).cpu().numpy()

    return predict


def _baseline(function: Any, x_batch: np.ndarray) -> np.ndarray | None:
    """What flipped features of each image become, where that is one number all the way; (N,)."""
    options = dict(getattr(function, "keywords", {}))
    value = options.pop("perturb_baseline", None)
    if getattr(function, "func", None) is not batch_baseline_replacement_by_indices or options:
        return None
    flat = x_batch.reshape(len(x_batch), -1)
    if isinstance(value, str):
        return flat.min(1) if value == "black" else flat.max(1) if value == "white" else None
    return np.full(len(flat), value, dtype=x_batch.dtype) if isinstance(value, (int, float)) else None


#: What `fastcam.adapters.accelerate("quantus")` replaces. Quantus' own methods make objects of Captum's and Zennit's
#: classes, which have accelerations of their own.
REPLACES: dict[Any, Any] = {_peer.PixelFlipping: PixelFlipping, _explain: _explain_by_name}


def __getattr__(name: str) -> Any:
    return fallback(name, _peer, __name__)
