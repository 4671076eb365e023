"""The registry of methods: one file for each method or tight family."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from . import (
    a_fmi,
    ablation_cam,
    attribution_equilibrium,
    cam,
    contrastive_lrp,
    deep_lift,
    eigen_cam,
    full_grad,
    grad_cam,
    grad_cam_pp,
    hires_cam,
    layer_cam,
    lfi_cam,
    lift_cam,
    lrp,
    rap,
    relevance_cam,
    rsp,
    score_cam,
    sfam,
    shap_cam,
    smooth_grad_cam_pp,
    xgrad_cam,
)
from ._method import CamOptions, Evidence, Method, PairMethod, Passage

__all__ = ["CamOptions", "Evidence", "Method", "PairMethod", "Passage", "get", "methods", "pair", "single"]

_METHODS: dict[str, Method | PairMethod] = {
    method.name: method
    for method in (
        lift_cam.METHOD,
        a_fmi.METHOD,
        sfam.METHOD,
        lfi_cam.METHOD,
        attribution_equilibrium.METHOD,
        cam.METHOD,
        grad_cam.METHOD,
        grad_cam_pp.METHOD,
        smooth_grad_cam_pp.METHOD,
        xgrad_cam.METHOD,
        hires_cam.METHOD,
        layer_cam.METHOD,
        eigen_cam.EIGEN_CAM,
        eigen_cam.EIGEN_GRAD_CAM,
        score_cam.SCORE_CAM,
        score_cam.SS_CAM,
        score_cam.IS_CAM,
        ablation_cam.METHOD,
        shap_cam.METHOD,
        full_grad.METHOD,
        deep_lift.METHOD,
        lrp.LRP,
        relevance_cam.METHOD,
        contrastive_lrp.CLRP,
        contrastive_lrp.SGLRP,
        rap.METHOD,
        rsp.METHOD,
        lrp.GUIDED_BACKPROP,
        lrp.DECONVNET,
    )
}


def get(name: str) -> Method | PairMethod:
    """The method called `name`; ValueError with the closest names for another one, TypeError for no name."""
    if not isinstance(name, str):
        raise TypeError(f"method must be a name, such as 'lift_cam'; got {type(name).__name__}")
    if name not in _METHODS:
        close = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no method {name!r}; {hint}methods: {', '.join(_METHODS)}")
    return _METHODS[name]


def single(name: str) -> Method:
    """The method called `name`, which explains images one by one; ValueError for one of pairs, or as `get`."""
    method = get(name)
    if isinstance(method, PairMethod):
        raise ValueError(
            f"method '{name}' explains pairs of images: call fastcam.attribute_pair(model, a, b, '{name}')"
        )
    return method


def pair(name: str) -> PairMethod:
    """The method called `name`, which explains pairs; ValueError for one of single images, or as `get`."""
    method = get(name)
    if isinstance(method, PairMethod):
        return method
    known = ", ".join(key for key, value in _METHODS.items() if isinstance(value, PairMethod))
    raise ValueError(f"method '{name}' explains images one by one (fastcam.attribute); methods for pairs: {known}")


def methods() -> dict[str, dict[str, Any]]:
    """Every method by name: a one-line `summary`, its `source`, what it `explains` ("images", for most), and its
    `options` with their defaults."""
    return {
        name: {
            "summary": method.summary,
            "source": method.source,
            "explains": method.explains,
            "options": {field.name: field.default for field in dataclasses.fields(method.options) if field.init},
        }
        for name, method in _METHODS.items()
    }
