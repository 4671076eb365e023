"""Networks by name, with weights, what is known of their classes, and how their pictures are prepared.

loaded = load_model("torchvision:resnet50", weights="resnet50.safetensors")
scores = loaded.model(loaded.prepare(picture).unsqueeze(0))
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .libraries import Built, hugging_face, timm, torchvision
from .prepare import Prepare
from .weights import check_finite, weights_hash, with_weights

__all__ = ["LoadedModel", "Prepare", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to be explained.

    model         in evaluation mode, on the CPU (a module that was passed in: as it was)
    spec          what it was loaded by, or the class's name
    weights_hash  of its state dict (`weights.weights_hash`)
    prepare       picture -> (C, H, W) float32
    classes       names of the outputs, where the library or the file tells
    """

    model: nn.Module
    spec: str
    weights_hash: str
    prepare: Prepare
    classes: tuple[str, ...] | None

    @property
    def image_size(self) -> tuple[int, ...] | None:
        """(H, W) of the pictures the network takes, where it is known."""
        return self.prepare.size

    @property
    def mean(self) -> tuple[float, ...] | None:
        return self.prepare.mean

    @property
    def std(self) -> tuple[float, ...] | None:
        return self.prepare.std


def load_model(
    spec: str | nn.Module,
    *,
    weights: str | Path | None = None,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop: float | str | None = None,
) -> LoadedModel:
    """The network that `spec` names.

    spec     "torchvision:resnet50" · "timm:resnet50" · "hf:DIR_OR_NAME" (a transformers image classifier) ·
             "testbed:tiny_resnet" · "module.path:factory" (a function without arguments that returns a module) ·
             "network.pt2" (`torch.export.save`) · a module
    weights  a safetensors file or a checkpoint of tensors (`weights.read_weights`); the number of classes is read from
             it. "default", or the name of an entry such as "IMAGENET1K_V1": the library's own, downloaded where they
             are not there yet. None: those that come with the spec; torchvision's and timm's networks get random ones
             (seed 0), with a warning
    image_size, mean, std, interpolation, crop
             how pictures are prepared (`prepare.Prepare.changed`), in place of what the library, the weights' entry or
             the folder says

    Raises ValueError for an unknown name, weights that do not fit, hold NaN, or would run code when read; ImportError
    where a package is missing; TypeError for a factory that makes no module.
    """
    if isinstance(spec, nn.Module):
        if weights is not None:
            raise ValueError("weights= goes with a named model; a module that is passed in is left as it is")
        built, name = Built(spec), type(spec).__name__
    else:
        built, name = _built(spec, None if weights is None else str(weights)), spec
        built.model.eval()
    check_finite(built.model.state_dict().items(), name)
    prepare = built.prepare.changed(image_size=image_size, mean=mean, std=std, interpolation=interpolation, crop=crop)
    return LoadedModel(built.model, name, weights_hash(built.model), prepare, built.classes)


def _built(spec: str, weights: str | None) -> Built:
    if spec.lower().endswith(".pt2"):
        return _exported(spec, weights)
    kind, colon, name = spec.partition(":")
    if not colon or not name:
        raise ValueError(
            f"model {spec!r} is not understood: torchvision:NAME, timm:NAME, hf:DIR_OR_NAME, testbed:NAME, "
            "module.path:factory, or a file NAME.pt2"
        )
    libraries: dict[str, Callable[[str, str | None], Built]] = {
        "torchvision": torchvision,
        "timm": timm,
        "hf": hugging_face,
        "testbed": _testbed,
    }
    if kind not in libraries:
        return _factory(kind, name, weights)
    with torch.random.fork_rng(devices=[]):  # random weights are the same at every start, so a job can be resumed
        torch.manual_seed(0)
        built = libraries[kind](name, weights)
    if built.random:
        warnings.warn(
            f"{spec} has random weights: its maps mean nothing; give weights=FILE, or weights='default' for the "
            "library's own (downloaded)",
            stacklevel=3,
        )
    return built


def _testbed(name: str, weights: str | None) -> Built:
    from fastcam import testbed

    if weights == "default":
        weights = None  # they are shipped
    model = testbed.load(name) if weights is None else with_weights(lambda classes: _tiny(name, classes), weights)
    size = 32 if name in testbed.ATTENDERS else 96
    prepare = Prepare((size, size), size, "bilinear", testbed.MEAN, testbed.STD)
    return Built(model, prepare, tuple("0123456789") if name not in testbed.EMBEDDERS else None)


def _tiny(name: str, classes: int | None) -> nn.Module:
    from fastcam import testbed

    if classes is None or name not in testbed.MODELS:
        return testbed.build(name)
    return testbed.MODELS[name](classes)  # type: ignore[call-arg]


def _exported(path: str, weights: str | None) -> Built:
    from .exported import load_exported

    if weights is not None:
        raise ValueError(f"{path} holds its own weights; weights={weights!r} cannot be put into it")
    model, shape = load_exported(path)
    # The size is known; how pixels are scaled is not part of the program.
    size = (shape[1], shape[2]) if shape else None
    return Built(model, Prepare(size, None if size is None else min(size)))


def _factory(module: str, name: str, weights: str | None) -> Built:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"there is no Python module {module!r}: put its folder on the path, e.g. PYTHONPATH=. ; "
            "libraries are torchvision:, timm:, hf: and testbed:"
        ) from error
    factory = getattr(found, name, None)
    if factory is None:
        close = difflib.get_close_matches(name, vars(found), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"module {module!r} has no {name!r}{hint}")
    if isinstance(factory, nn.Module):
        build = lambda classes: factory  # noqa: E731
    elif callable(factory):
        takes = "num_classes" in inspect.signature(factory).parameters
        build = lambda classes: factory(num_classes=classes) if takes and classes is not None else factory()  # noqa: E731
    else:
        raise TypeError(f"{module}:{name} is {type(factory).__name__}, neither a module nor a function that makes one")
    if weights == "default":
        raise ValueError(f"{module}:{name} has no default weights; give a file, or let the factory load them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = build(None) if weights is None else with_weights(build, weights)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{module}:{name} returned {type(made).__name__}, not a torch.nn.Module")
    return Built(made)
