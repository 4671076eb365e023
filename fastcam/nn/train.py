"""Training an image classifier from scratch, as LFI-CAM's experiments do; survives being killed.

    python -m fastcam.nn.train --data testbed --network resnet20 --epochs 12 --drops 8,11 --out run
    python -m fastcam.nn.train --data pictures/ --network torchvision:resnet18 --size 224 --augment resized --out run

The same as `fastcam train-lficam`. SGD with momentum, the rate divided by ten at the epochs `drops`, weight decay, no
dropout, one cross-entropy loss. The epoch with the best accuracy on a held-out part of the training images is kept, not
the one best on test images. All randomness follows from the seed, the epoch and an image's number: a run that was
killed and resumed ends with the same weights, bit for bit (same machine, thread count and torch).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcam._device import device_of
from fastcam._tensor_file import read_tensors
from fastcam._torchvision import torchvision_models

from .backbones import densenet_bc, resnet, resnext29, without_classifier
from .data import ImageFolder, Images, augmented, digits, image_folder
from .lfi_cam import LFICAM

__all__ = ["Recipe", "Report", "evaluate", "lfi_cam_of", "load", "main", "train"]

log = logging.getLogger("fastcam")

Loss = Callable[[Any, Tensor], Tensor]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights beside the network and the images. Defaults: those of the released LFI-CAM code for
    CIFAR, but for `validation`, which it does not hold out.

    epochs, batch    length, and images a step
    rate, drops      learning rate; epochs before which it is divided by ten
    momentum, decay  of SGD; weight decay on all parameters
    size, augment    side of the views; how they are cut (`fastcam.nn.data.augmented`)
    mean, std        normalisation of the images, per channel
    validation       share of the training images held out to choose the epoch
    seed             of initial weights (set by the caller), order and views
    """

    epochs: int = 300
    batch: int = 128
    rate: float = 0.1
    drops: tuple[int, ...] = (150, 225)
    momentum: float = 0.9
    decay: float = 1e-4
    size: int = 32
    augment: str = "crop+flip"
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2023, 0.1994, 0.2010)
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive; got {self.rate}")
        for name, least in (("mean", -math.inf), ("std", 0)):
            numbers = getattr(self, name)
            if len(numbers) not in (1, 3) or not all(least < number < math.inf for number in numbers):
                kind = "positive" if name == "std" else "finite"
                raise ValueError(f"{name} must be one or three {kind} numbers; got {', '.join(map(str, numbers))}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must lie in [0, 1); got {self.validation}")


@dataclass
class Report:
    """What a run has come to: accuracies in [0, 1], one of each list an epoch; `best` is the epoch that is kept."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best: int = -1
    seconds: float = 0.0


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    loss: Loss | None = None,
    workers: int = 1,
    note: Note = log.info,
    about: Mapping[str, Any] | None = None,
) -> Report:
    """Train `model` in place; it ends in eval mode with the weights of its best epoch, the last one where no images are
    held out.

    out      folder for `last.pt`, replaced after each epoch in one step, and `best.pt`; None: none
    resume   go on from `last.pt`, if there is one; `epochs` may be more than the run was begun with
    loss     (output, labels) -> scalar; None: cross-entropy of the output, or of its `logits`
    workers  threads that read and cut images
    note     is told of the progress, a line an epoch
    about    further facts of the run (what JSON can hold), kept in the checkpoints and compared on `resume`

    Raises ValueError for fewer images than a batch or a share to hold out that comes to none, FileExistsError for an
    `out` with a run in it without `resume`, ValueError naming the difference for one of another recipe, network or set
    of images, FloatingPointError where the loss is not finite.
    """
    measure = loss or _cross_entropy
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed))
    held = round(len(images) * recipe.validation)
    if recipe.validation and not held:
        raise ValueError(
            f"validation={recipe.validation} of {len(images)} images holds out none; pass at least "
            f"{1 / len(images):.2g}, or 0 to keep the last epoch"
        )
    kept, shown = order[: len(images) - held], order[len(images) - held :]
    if len(kept) < recipe.batch:
        raise ValueError(f"{len(kept)} training images make no batch of {recipe.batch}; pass a smaller batch")
    optimizer = torch.optim.SGD(model.parameters(), recipe.rate, recipe.momentum, weight_decay=recipe.decay)
    report, best = Report(), _state(model)
    facts = {"recipe": asdict(recipe), "identity": _identity(model, images) | dict(about or {})}
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "last.pt").exists():
            if not resume:
                raise FileExistsError(
                    f"{folder} holds a run; pass resume (--resume) to go on with it, or another folder"
                )
            report, best = _restore(folder / "last.pt", model, optimizer, facts)
            note(f"going on after epoch {len(report.losses)} of {recipe.epochs}")
    with ThreadPoolExecutor(workers) as pool:
        for epoch in range(len(report.losses), recipe.epochs):
            begin = time.perf_counter()
            report.losses.append(_epoch(model, images, recipe, kept, epoch, optimizer, measure, pool))
            report.validation.append(evaluate(model, images, recipe, shown, pool) if held else 0.0)
            if report.validation[-1] >= max(report.validation):
                report.best, best = epoch, _state(model)
            report.seconds += time.perf_counter() - begin
            rate = len(kept) * (epoch + 1) / report.seconds
            left = report.seconds / (epoch + 1) * (recipe.epochs - epoch - 1)
            accuracy = f"held-out accuracy {report.validation[-1]:.4f}, " if held else ""
            note(
                f"epoch {epoch + 1} of {recipe.epochs}: loss {report.losses[-1]:.4f}, {accuracy}{rate:.0f} images/s, "
                f"{left:.0f} s to go"
            )
            if folder is not None:
                told = json.dumps(facts | {"report": asdict(report)})
                state = {"model": _state(model), "optimizer": optimizer.state_dict(), "best": best, "facts": told}
                _write(folder / "last.pt", state)
    model.load_state_dict(best)
    if folder is not None:
        _write(folder / "best.pt", {"model": best, "facts": json.dumps(facts | {"report": asdict(report)})})
    model.eval()
    return report


def _epoch(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    kept: Tensor,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    measure: Loss,
    pool: ThreadPoolExecutor,
) -> float:
    """One pass over images `kept`, in an order of its own; the mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate * 0.1 ** sum(epoch >= drop for drop in recipe.drops)
    device = next(model.parameters()).device
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(hash((recipe.seed, epoch))))
    steps, total = len(kept) // recipe.batch, 0.0
    model.train()
    for rows in kept[order[: steps * recipe.batch]].split(recipe.batch):
        views = torch.stack(list(pool.map(lambda i: _view(images, i, recipe, epoch), rows.tolist())))
        loss = measure(model(_normalized(views, recipe).to(device)), images.labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}; lower the rate")
    return total / steps


def evaluate(
    model: nn.Module, images: Images, recipe: Recipe, rows: Tensor | None = None, pool: ThreadPoolExecutor | None = None
) -> float:
    """Accuracy in [0, 1] on the middle views of images `rows` (default: all)."""
    rows = torch.arange(len(images)) if rows is None else rows
    device = next(model.parameters()).device
    plain = replace(recipe, augment="none")
    run = map if pool is None else pool.map
    model.eval()
    right = 0
    with torch.inference_mode():
        for part in rows.split(recipe.batch):
            views = torch.stack(list(run(lambda i: _view(images, i, plain, 0), part.tolist())))
            output = model(_normalized(views, recipe).to(device))
            right += int((_logits(output).argmax(1).cpu() == images.labels[part]).sum())
    return right / max(len(rows), 1)


def lfi_cam_of(network: str, classes: int, size: int, *, branch: bool = True, stem: str = "stride1") -> nn.Module:
    """An untrained LFI-CAM network by name.

    network  "resnet20" (8 to 110, depth 6 n + 2), "densenet100", "resnext29", for small images · "torchvision:resnet18"
             or "timm:resnet18" (any ResNet of theirs), for 224 pixels
    branch   False: the plain classifier, attention off in the scores

    Raises ValueError for another name, ImportError where the named library is missing.
    """
    library, _, name = network.rpartition(":")
    tail = None
    if library:
        backbone = without_classifier(_library_model(library, name), stem=stem)  # type: ignore[arg-type]
    elif network.startswith("resnet") and network[6:].isdecimal():
        backbone = resnet(int(network[6:]))
    elif network.startswith("densenet") and network[8:].isdecimal():
        backbone, tail = densenet_bc(int(network[8:]))
    elif network == "resnext29":
        backbone = resnext29()
    else:
        raise ValueError(
            f"unknown network {network!r}: there are resnet20 (and other depths), densenet100, resnext29, "
            "torchvision:resnet18, timm:resnet18 and their relatives"
        )
    init: Any = "default" if network == "resnext29" else "kaiming"
    return LFICAM(backbone, classes, tail=tail, image_size=(3, size, size), fin_init=init, attention=branch)


def _library_model(library: str, name: str) -> nn.Module:
    if library == "torchvision":
        make = getattr(torchvision_models(), name, None)
        if not name.startswith(("resnet", "resnext", "wide_resnet")) or make is None:
            raise ValueError(f"torchvision has no ResNet called {name!r}")
        return make(weights=None)
    if library == "timm":
        torchvision_models()  # which timm imports
        import timm

        return timm.create_model(name, pretrained=False)
    raise ValueError(f"unknown library {library!r}: torchvision or timm")


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    return functional.cross_entropy(_logits(output), labels)


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _view(images: Images, index: int, recipe: Recipe, epoch: int) -> Tensor:
    image = images.image(index)
    if min(image.shape[1:]) < recipe.size and recipe.augment != "resized":
        raise ValueError(f"image {index} is {tuple(image.shape[1:])}, smaller than the views' side {recipe.size}")
    return augmented(image, recipe.size, recipe.augment, (recipe.seed, epoch, index))


def _normalized(views: Tensor, recipe: Recipe) -> Tensor:
    mean, std = (views.new_tensor(each).view(-1, 1, 1) for each in (recipe.mean, recipe.std))
    return (views - mean) / std


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _identity(model: nn.Module, images: Images) -> dict[str, Any]:
    """What has to be the same for a run to be gone on with."""
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    labels = images.labels.to(torch.int64).numpy().tobytes()
    return {"network": zlib.crc32(repr(shapes).encode()), "images": len(images), "labels": zlib.crc32(labels)}


def _write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file in one step, once its new contents are on the disk."""
    fresh = path.with_suffix(".tmp")
    with fresh.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    with contextlib.suppress(OSError):  # not every system lets a folder be synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> tuple[Report, dict[str, Tensor]]:
    document = read_tensors(path, "checkpoint", next(model.parameters()).device)
    before, now = json.loads(document["facts"]), json.loads(json.dumps(facts))
    for part, what in (("recipe", "another recipe"), ("identity", "another network or other images")):
        then = before[part]
        changed = [
            f"{key} was {then.get(key)!r}, is {value!r}"
            for key, value in now[part].items()
            if then.get(key) != value and key != "epochs"  # which no step depends on
        ]
        if changed:
            raise ValueError(f"{path} is a run of {what}: {'; '.join(changed)}")
    report = Report(**before["report"])
    if len(report.losses) > now["recipe"]["epochs"]:
        raise ValueError(
            f"{path} has {len(report.losses)} epochs behind it, more than epochs={now['recipe']['epochs']}"
        )
    model.load_state_dict(document["model"])
    optimizer.load_state_dict(document["optimizer"])
    return report, document["best"]


def load(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A network that `fastcam train-lficam` has trained, in eval mode, from its `best.pt`, and what is known of the
    run: "recipe" (with "mean", "std" and "size" of the images), "identity" (with "classes"), "report".

    Reads tensors only, never pickled code. Raises ValueError for a file of another origin.
    """
    document = read_tensors(path, "checkpoint")
    facts = json.loads(document["facts"]) if isinstance(document, dict) and "facts" in document else {}
    about = facts.get("identity", {})
    if "built" not in about:
        raise ValueError(f"{path} was not written by `fastcam train-lficam`")
    name, classes, size, branch, stem = about["built"]
    model = lfi_cam_of(name, classes, size, branch=branch, stem=stem)
    model.load_state_dict(document["model"])
    return model.eval(), facts


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastcam train-lficam`."""
    usual = Recipe()
    parser.add_argument("--data", required=True, help="a folder of class folders of images, or 'testbed'")
    parser.add_argument("--test", help="a second such folder, to report the accuracy on")
    parser.add_argument("--out", required=True, help="folder of the checkpoints last.pt and best.pt")
    parser.add_argument(
        "--network", default="resnet20", help="resnet20, densenet100, resnext29, torchvision:resnet18, ..."
    )
    parser.add_argument("--stem", choices=("stride1", "keep"), default="stride1", help="of torchvision's and timm's")
    parser.add_argument("--plain", action="store_true", help="without the attention in the scores, for comparison")
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--rate", type=float, default=usual.rate)
    parser.add_argument("--drops", default="150,225", help="epochs before which the rate is divided by ten")
    parser.add_argument("--decay", type=float, default=usual.decay)
    parser.add_argument("--size", type=int, default=usual.size, help="side of the views in pixels")
    parser.add_argument(
        "--augment", choices=("crop", "crop+flip", "resized", "none"), help="default: crop+flip; testbed: crop"
    )
    parser.add_argument("--mean", help="of the images' channels, e.g. 0.5,0.5,0.5; default: CIFAR's up to 64 pixels, ")
    parser.add_argument("--std", help="likewise; ImageNet's beyond")
    parser.add_argument("--validation", type=float, default=usual.validation, help="share held out to choose by")
    parser.add_argument("--images", type=int, default=6000, help="images of the testbed")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--workers", type=int, default=2, help="threads that read images")
    parser.add_argument("--threads", type=int, help="CPU threads of the network (default: torch's choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")


def run(given: argparse.Namespace) -> int:
    """Train as the options say, print the accuracies; 0, or 2 for options that do not fit."""
    try:
        return _run(given)
    except (ValueError, RuntimeError, OSError, ImportError, FloatingPointError) as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    for option in ("threads", "workers", "images"):
        number = getattr(given, option)
        if number is not None and number < 1:
            raise ValueError(f"--{option} must be at least 1; got {number}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = device_of(given.device)
    small = given.data == "testbed"
    side = given.size if given.size <= 64 else round(given.size * 8 / 7)  # 256 for views of 224
    names = [str(digit) for digit in range(10)]
    images: Images
    if small:
        images, _ = digits(given.images, size=given.size, seed=given.seed)
    else:
        images, names = image_folder(given.data, resize=side)
        if len(names) == 1:
            raise ValueError(f"{given.data} holds the class '{names[0]}' alone; a classifier needs two or more")
    tested: Images | None = digits(2000, split="test", size=given.size)[0] if small else None
    if given.test:  # looked at now, not after hours
        tested = _renumbered(*image_folder(given.test, resize=side), names)
    usual = Recipe() if given.size <= 64 else Recipe(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    recipe = Recipe(
        epochs=given.epochs,
        batch=given.batch,
        rate=given.rate,
        drops=tuple(int(each) for each in _numbers(given.drops, "--drops", "150,225", whole=True)),
        decay=given.decay,
        size=given.size,
        augment=given.augment or ("crop" if small else "crop+flip"),
        mean=_numbers(given.mean, "--mean", "0.5,0.5,0.5") or usual.mean,
        std=_numbers(given.std, "--std", "0.2,0.2,0.2") or usual.std,
        validation=given.validation,
        seed=given.seed,
    )
    torch.manual_seed(given.seed)
    built = (given.network, len(names), given.size, not given.plain, given.stem)
    model = lfi_cam_of(*built[:3], branch=built[3], stem=built[4]).to(device)
    data = given.data if given.data == "testbed" else str(Path(given.data).resolve())
    about = {"built": list(built), "classes": names, "data": data}
    note = partial(print, flush=True)  # into pipes and files, too
    report = train(model, images, recipe, given.out, resume=given.resume, workers=given.workers, note=note, about=about)
    accuracy = report.validation[report.best]
    print(
        f"best epoch {report.best + 1}, held-out accuracy {accuracy:.4f}"
        if recipe.validation
        else f"kept epoch {report.best + 1}, the last one: no images were held out to choose by"
    )
    if tested is not None:
        print(f"test accuracy {evaluate(model, tested, recipe):.4f} on {len(tested)} images")
    print(Path(given.out) / "best.pt")
    return 0


def _numbers(text: str | None, option: str, example: str, whole: bool = False) -> tuple[float, ...]:
    try:
        return tuple(int(each) if whole else float(each) for each in (text or "").split(",") if each)
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"{option} must be {kind} with commas between them, such as {example}; got {text!r}") from None


def _renumbered(images: ImageFolder, own: Sequence[str], names: Sequence[str]) -> ImageFolder:
    """Images whose labels count the classes `names` rather than their folder's own."""
    unknown = [name for name in own if name not in names]
    if unknown:
        raise ValueError(f"class '{unknown[0]}' of the test images is none of the training images'")
    places = torch.tensor([list(names).index(name) for name in own])
    return replace(images, labels=places[images.labels])


def main(given: Sequence[str] | None = None, prog: str = "python -m fastcam.nn.train") -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Train an LFI-CAM network.")
    arguments(parser)
    return run(parser.parse_args(given))


if __name__ == "__main__":
    raise SystemExit(main())
