"""torchvision's classifiers, also beside a torch that torchvision was not built for."""

from __future__ import annotations

import logging
from types import ModuleType

import torch

__all__ = ["torchvision_models"]

log = logging.getLogger("fastcam")

#: Schemas of torchvision's missing operators; they live as long as this object does.
_SCHEMAS: list[torch.library.Library] = []


def torchvision_models() -> ModuleType:
    """`torchvision.models`, also where torchvision was built for a CUDA torch and this torch is the CPU one.

    Such a torchvision, which is what a package index gives beside CPU-only torch, fails on import because its operators
    are not there. Their schemas are all the classifiers need, so they are declared and the import is tried again, with
    one line in the log; the operators themselves still raise (no detection models).

    Raises ImportError with the command that cures it where torchvision is missing.
    """
    try:
        import torchvision.models as models
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError(
            "torchvision is not installed; install the release that belongs to this torch without its dependencies: "
            "pip install --no-deps torchvision pillow"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        log.info(
            "torchvision was built for another torch than %s: its classifiers work, its detection operators do not",
            torch.__version__,
        )
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
        import torchvision.models as models
    return models
