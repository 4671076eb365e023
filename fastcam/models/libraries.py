"""Image classifiers of torchvision, timm and transformers, with what those say about their pictures and classes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fastcam._torchvision import torchvision_models

from .prepare import Prepare
from .weights import with_weights

__all__ = ["Built", "hugging_face", "timm", "torchvision"]

_NEAREST = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


@dataclasses.dataclass
class Built:
    """A network, how its pictures are prepared, its classes' names, and whether its weights are random."""

    model: nn.Module
    prepare: Prepare = dataclasses.field(default_factory=Prepare)
    classes: tuple[str, ...] | None = None
    random: bool = False


def torchvision(name: str, weights: str | None) -> Built:
    """A classifier of torchvision. Pictures as the weights' entry says: the entry whose file the weights are named
    after (resnet50-0676ba61.pth), else the library's default."""
    models = torchvision_models()
    known = models.list_models(module=models)
    _check_known(name, known, "torchvision", "classifier")
    entries = models.get_model_weights(name)
    entry, own = _entry(entries, weights)
    model: nn.Module
    if own:
        model = models.get_model(name, weights=entry)
    else:

        def build(classes: int | None) -> nn.Module:
            options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
            if name in ("googlenet", "inception_v3"):
                options["init_weights"] = weights is None  # slow, and overwritten
            return models.get_model(name, weights=None, **options)

        model = build(None) if weights is None else with_weights(build, weights)
    preset = entry.transforms()
    prepare = Prepare(
        (preset.crop_size[0], preset.crop_size[0]),
        preset.resize_size[0],
        preset.interpolation.value.removesuffix("-exact"),
        tuple(preset.mean),
        tuple(preset.std),
    )
    return Built(model, prepare, _named(entry.meta.get("categories"), model), weights is None)


def _entry(entries: Any, weights: str | None) -> tuple[Any, bool]:
    """The entry of torchvision's weights that describes the pictures, and whether it is asked for itself."""
    if weights == "default":
        return entries.DEFAULT, True
    for entry in entries:
        if weights == entry.name:
            return entry, True
    stem = "" if weights is None else Path(weights).stem
    return next((e for e in entries if Path(e.url).stem == stem or e.name in stem), entries.DEFAULT), False


def timm(name: str, weights: str | None) -> Built:
    """A classifier of timm; pictures as its configuration says (`resolve_data_config`)."""
    torchvision_models()  # timm imports torchvision, which may have to be helped
    try:
        import timm as library
    except ImportError as error:
        raise ImportError("timm's networks need timm: pip install --no-deps timm huggingface_hub") from error
    if "/" not in name and ":" not in name:  # else a place on the Hub
        _check_known(name.partition(".")[0], library.list_models(), "timm", "network")

    def build(classes: int | None) -> nn.Module:
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        return library.create_model(name, pretrained=weights == "default", **options)

    file = weights is not None and weights != "default"
    model = with_weights(build, str(weights)) if file else build(None)
    facts = library.data.resolve_data_config({}, model=model)
    size, share, mode = tuple(facts["input_size"][1:]), facts["crop_pct"], facts.get("crop_mode", "center")
    scaled = tuple(math.floor(side / share) for side in size)
    resize: Any = scaled if mode == "squash" else scaled[0]
    if mode == "border" or (mode == "center" and scaled[0] != scaled[1]):
        resize = None  # neither can be said by these fields; explicit arguments can
    interpolation = facts["interpolation"] if facts["interpolation"] != "random" else "bilinear"
    prepare = Prepare(
        size if resize is not None else None, resize, interpolation, tuple(facts["mean"]), tuple(facts["std"])
    )
    subset = library.data.infer_imagenet_subset(model)
    names = library.data.ImageNetInfo(subset).label_descriptions() if subset else None
    return Built(model, prepare, _named(names, model), weights is None)


def hugging_face(name: str, weights: str | None) -> Built:
    """A transformers image classifier from a folder, or by name from the Hub's cache (`weights="default"` downloads).

    Its output is a structure whose `logits` are the scores. Code from the Hub is never run.
    """
    with contextlib.suppress(ImportError):
        torchvision_models()  # transformers imports torchvision where there is one, which may have to be helped
    try:
        import transformers
    except ImportError as error:
        raise ImportError("hf: models need transformers: pip install transformers") from error
    local = weights != "default"
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    automatic = transformers.AutoModelForImageClassification
    try:
        if weights is None or weights == "default":
            model = automatic.from_pretrained(name, **options)
        else:
            config = transformers.AutoConfig.from_pretrained(name, **options)

            def build(classes: int | None) -> nn.Module:
                if classes is not None:
                    config.num_labels = classes
                return automatic.from_config(config, trust_remote_code=False)

            model = with_weights(build, weights)
        facts = transformers.utils.cached_file(
            name, "preprocessor_config.json", local_files_only=local, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        hint = "" if Path(name).is_dir() or not local else " (weights='default' allows the download)"
        raise ValueError(f"hf:{name} cannot be loaded: {str(error).splitlines()[0]}{hint}") from error
    prepare = _processor(json.loads(Path(facts).read_text())) if facts else Prepare()
    names = [model.config.id2label.get(number, "") for number in range(model.config.num_labels)]
    told = not all(label == f"LABEL_{number}" for number, label in enumerate(names))
    return Built(model, prepare, tuple(names) if told else None)


def _processor(facts: dict[str, Any]) -> Prepare:
    """A transformers image processor's configuration; nothing where it does what these fields cannot say."""
    size = facts.get("size") or {}
    sides = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    crop = facts.get("crop_size") if facts.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    shortest = sides.get("shortest_edge")
    exact = (sides["height"], sides["width"]) if "height" in sides and "width" in sides else None
    scaled = facts.get("do_rescale", True) and math.isclose(facts.get("rescale_factor", 1 / 255), 1 / 255)
    normalised = facts.get("do_normalize", True) and "image_mean" in facts and "image_std" in facts
    mean = tuple(facts["image_mean"]) if normalised else (0.0, 0.0, 0.0)
    std = tuple(facts["image_std"]) if normalised else (1.0, 1.0, 1.0)
    odd = facts.get("do_pad") or facts.get("rescale_offset") or "longest_edge" in sides
    named = str(facts.get("image_processor_type", facts.get("feature_extractor_type", "")))
    if not facts.get("do_resize", True) or not scaled or odd or named.startswith(("Levit", "Clip")):
        return Prepare()
    interpolation = _NEAREST.get(facts.get("resample", 2), "bilinear")
    resize: Any = exact if exact is not None else shortest
    if named.startswith("ConvNext") and shortest is not None:
        # Below 384 pixels the processor enlarges and crops; from there on it squashes.
        share = facts.get("crop_pct") or 224 / 256
        window = (shortest, shortest)
        resize = int(shortest / share) if shortest < 384 else window
    elif crop is not None:
        window = (crop["height"], crop["width"])
    elif exact is not None:
        window = exact
    else:
        return Prepare()  # pictures of any aspect are no batch
    return Prepare(window, resize, interpolation, mean, std)


def _named(names: Iterable[str] | None, model: nn.Module) -> tuple[str, ...] | None:
    """The names, where there are as many as the network has classes."""
    if names is None:
        return None
    listed = tuple(names)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    outputs = {m.out_features for m in linear[-1:]} | {m.out_channels for m in convolutions[-1:]}
    return listed if len(listed) in outputs else None


def _check_known(name: str, known: Iterable[str], library: str, what: str) -> None:
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"{library} has no {what} called {name!r}{hint}")
