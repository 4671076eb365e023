"""A method on a model as one `torch.export` program: images in, scores and maps out, plain ATen operators inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcam._straight_line import ExportError, straight_line
from fastcam.explainer import Explainer
from fastcam.program.targets import TargetSpec

__all__ = ["ExportError", "export_program"]


def export_program(
    model: nn.Module,
    method: str,
    example: Tensor,
    *,
    targets: TargetSpec = None,
    layer: str | nn.Module | None = None,
    size: str | Sequence[int] = "input",
    normalize: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> torch.export.ExportedProgram:
    """`fastcam.attribute` as a program that runs without Python and without fastcam.

        program = fastcam.export_program(model, "lift_cam", images)
        scores, maps = program.module()(images)                                  # any number of images
        torch.export.save(program, "explained.pt2")                              # runs where torch runs
        torch._inductor.aoti_compile_and_package(program, package_path="explained_aoti.pt2")       # from C++ too
        torch.onnx.export(program, (), "explained.onnx", output_names=["scores", "maps"])          # for onnxruntime

    example  (B, C, *spatial), B of at least 1: size, dtype and device the program is made for; B is free in the program
    targets  decides what the program is given. None, "top5", an int or a callable: program(images), which chooses the
             class itself (for an int, that one). A list or an integer tensor (B,) or (B, T): program(images, targets)
             with int64 targets of that many columns

    The other arguments are `fastcam.attribute`'s. The program returns (scores, maps): scores as the model gives them,
    maps (B, *size) or (B, T, *size) as in `Attribution.maps`. It cannot raise on numbers: the maps of an image whose
    map or scores are not finite, or one of whose targets does not exist, are zeros, as with on_nonfinite="mask".

    Weights are parameters and buffers of the program, under the model's names and sharing its memory until it is saved.
    The images' size is fixed. The model is not touched.

    Raises ExportError where the model cannot be captured or the method decides by numbers or by the number of images
    (those that perturb images in chunks); else as `fastcam.attribute`.
    Cost: one attribution of `example`, and about a hundredth of a second for each operator of the program: 5 s for
    LIFT-CAM on ResNet-18, 3 minutes for Attribution Equilibrium on DenseNet-121 (14,000 operators).
    """
    settings: dict[str, Any] = {"layer": layer, "size": size, "normalize": normalize, "mean": mean, "std": std}
    if options.get("on_nonfinite") == "raise":
        raise ValueError("an exported program cannot raise on numbers; leave on_nonfinite out: it masks")
    for name in ("compile", "differentiable"):
        if options.get(name):
            raise ValueError(
                f"{name} is for explainers that run in Python; leave it out: a program takes no part in it"
            )
    explainer = Explainer(model, method, **settings, **options)
    if isinstance(example, Tensor) and example.ndim and example.shape[0] == 0:
        raise ValueError(f"example must hold at least one image; got shape {tuple(example.shape)}")
    first = explainer(example, targets)  # with every check there is
    given = first.targets if isinstance(targets, (list, tuple, Tensor)) else None
    return straight_line(explainer, example, targets, given, lambda found: (found.scores, found.maps))
