"""fastcam: attribution maps at about the cost of the forward pass they explain, by fused kernels."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from fastcam import _interrupt  # noqa: F401  (first: those below take seconds)
from fastcam.backends import backend, backends
from fastcam.explainer import Attribution, Explainer, attribute
from fastcam.inputs import bind
from fastcam.methods import methods
from fastcam.pairs import Gallery, PairAttribution, PairExplainer, attribute_pair
from fastcam.program.relevance import register_relevance_rule
from fastcam.program.rescale import UnsupportedOpError, register_rescale_rule
from fastcam.tiles import attribute_tiles

__version__ = "0.1.0"
__all__ = [
    "Attribution",
    "Explainer",
    "Gallery",
    "PairAttribution",
    "PairExplainer",
    "UnsupportedOpError",
    "__version__",
    "attribute",
    "attribute_pair",
    "attribute_tiles",
    "backend",
    "backends",
    "bind",
    "methods",
]
__all__ += ["ExportError", "adapters", "export_program", "metrics", "nn", "ops", "register_relevance_rule"]
__all__ += ["register_rescale_rule", "relevance"]


def _adopt_checkout_kernels(pkg: str = __name__) -> None:
    """Let a bare checkout find `kernels/` as `fastcam.kernels`; an installed package has it already."""
    full, root = pkg + ".kernels", Path(__file__).resolve().parent.parent / "kernels"
    if importlib.util.find_spec(full) or not (root / "__init__.py").is_file():
        return
    spec = importlib.util.spec_from_file_location(full, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[full] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full]
        raise
    sys.modules[pkg].kernels = module  # type: ignore[attr-defined]  # else `fastcam.kernels` is no attribute


_adopt_checkout_kernels()


def __getattr__(name: str) -> Any:
    if name in ("adapters", "jobs", "metrics", "nn", "ops", "profiling", "relevance", "render"):
        return importlib.import_module(f"fastcam.{name}")
    if name in ("ExportError", "export_program"):  # whose imports are heavy
        return getattr(importlib.import_module("fastcam.export"), name)
    raise AttributeError(f"module 'fastcam' has no attribute {name!r}")
