"""`fastcam evaluate`: how good the maps of a job, or of a method on the testbed, are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastcam._device import device_of
from fastcam.explainer import Explainer

from . import report
from .evaluate import METRICS, Batch, Evaluation, Settings, evaluate

__all__ = ["main"]

_TESTBED = "testbed:"
_EXPLAINING = [name for name, metric in METRICS.items() if metric.needs == "method"]


def main(words: Sequence[str]) -> int:
    """Runs `evaluate ...` and returns the exit code: 0, 2 for wrong usage, 1 for an error on the way."""
    given = _parser().parse_args(words)
    try:
        found = _evaluate(given)
        paths = report.write(found, given.out)
    except (ValueError, TypeError, IndexError, FileNotFoundError) as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 1
    print(report.as_markdown(found), end="")
    print("\nwrote " + ", ".join(map(str, paths)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcam evaluate",
        description="Metrics of attribution maps: a table (JSON, CSV, markdown) and curves (PNG).",
        epilog=f"metrics: {', '.join(METRICS)}; 'all' takes those the data allows, but for "
        f"{', '.join(_EXPLAINING)}, which explain every image again many times",
    )
    maps = parser.add_mutually_exclusive_group(required=True)
    maps.add_argument("--maps", type=Path, metavar="STORE", help="maps of a job: what fastcam run wrote")
    maps.add_argument("--method", help="explain the testbed's scenes with this method now (with --model testbed:NAME)")
    parser.add_argument("--metrics", default="all", metavar="A,B", help="comma-separated names, or all (default)")
    parser.add_argument("--model", help="the job's, if not as the store says; or testbed:tiny_resnet, testbed:tiny_vgg")
    parser.add_argument("--weights", help="of the model, as for fastcam run")
    parser.add_argument("--images", metavar="SOURCE", help="the job's images, if not where the store says")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="PNG masks named as the items, white on the object")
    parser.add_argument("--output", choices=("probability", "sigmoid", "logit"), help="what a score is (default: "
                        "probability; sigmoid on the testbed)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=50, help="of insertion and deletion (default: %(default)s)")
    parser.add_argument(
        "--baseline", default="mean", help="of deleted pixels: black, white, mean, image_mean, blur, noise"
    )
    parser.add_argument("--tolerance", type=float, default=0, help="of the pointing game, in pixels (default: 0)")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the overlap (default: %(default)s)")
    parser.add_argument("--radius", type=float, default=0.2, help="of max_sensitivity's noise (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=10, help="noisy copies an image, likewise (default: 10)")
    parser.add_argument(
        "--chunk", type=int, default=32, help="perturbed inputs in a forward pass (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items (default: all; 64 on the testbed)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise, and of the testbed's scenes (default: 0)")
    parser.add_argument(
        "--out", default="evaluation", metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    return parser


def _evaluate(given: argparse.Namespace) -> Evaluation:
    for name in ("batch_size", "limit"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if Path(given.out).exists() and not Path(given.out).is_dir():
        raise ValueError(f"--out must be a folder; {given.out} is a file")
    given.device = device_of(given.device)
    return _testbed(given) if given.maps is None else _stored(given)


def _settings(given: argparse.Namespace, usual: str, mean: Any, std: Any, method: Any) -> Settings:
    names = ("steps", "baseline", "chunk", "seed", "tolerance", "threshold", "radius", "samples")
    own = {name: getattr(given, name) for name in names}
    return Settings(output=given.output or usual, mean=mean, std=std, method=method, **own)


def _metrics(text: str, masks: bool) -> list[str]:
    if text == "all":
        allowed = {"maps", "model", "masks"} if masks else {"maps", "model"}
        return [name for name, metric in METRICS.items() if metric.needs in allowed]
    return [name.strip() for name in text.split(",") if name.strip()]


def _testbed(given: argparse.Namespace) -> Evaluation:
    """Scenes with two digits, a map for each; masks are known, classes are independent."""
    from fastcam.testbed import load, make_scenes, normalize
    from fastcam.testbed.models import MEAN, STD

    if given.model is None or not given.model.startswith(_TESTBED):
        raise ValueError(
            f"--method explains the testbed's scenes: pass --model testbed:NAME, not {given.model!r}; for other "
            "networks and images make a store with fastcam run, then pass --maps"
        )
    model = load(given.model.removeprefix(_TESTBED), given.weights).to(given.device)

    def method(network: nn.Module) -> Explainer:
        return Explainer(network, given.method, mean=MEAN, std=STD)

    explainer = method(model)
    count = given.limit or 64

    def batches() -> Iterator[Batch]:
        for start in range(0, count, given.batch_size):
            scenes = make_scenes(min(given.batch_size, count - start), seed=given.seed, start=start)
            images, labels, masks = (x.to(given.device) for x in (scenes.images, scenes.labels, scenes.masks))
            images = normalize(images)
            ids = [f"scene {start + i}" for i in range(len(images))]
            yield Batch(images, explainer(images, labels).maps, labels, masks, ids)

    settings = _settings(given, "sigmoid", MEAN, STD, method)
    return evaluate(
        model, batches(), _metrics(given.metrics, True), settings, {"model": given.model, "method": given.method}
    )


def _stored(given: argparse.Namespace) -> Evaluation:
    from fastcam.jobs import Store
    from fastcam.jobs.sources import open_source
    from fastcam.models import load_model

    from .stored import batches_of

    store = Store(given.maps)
    facts = {key: store.provenance.get(key) for key in ("model", "weights_hash", "method", "options", "layer_used")}
    spec = given.model or facts["model"]
    images = given.images or (store.provenance.get("source") or {}).get("where")
    if images is None:
        raise ValueError("the store does not say where its images are: pass --images")
    loaded = load_model(spec, weights=given.weights)
    if loaded.weights_hash != facts["weights_hash"]:
        raise ValueError(f"the maps explain other weights of {facts['model']!r} than those loaded: pass --weights")
    prepare = type(loaded.prepare)(**store.provenance["preprocessing"])
    items = batches_of(
        store, open_source(images), prepare, masks=given.masks, batch_size=given.batch_size, limit=given.limit,
        device=given.device,
    )  # fmt: skip
    model = loaded.model.to(given.device)
    settings = _settings(given, "probability", prepare.mean, prepare.std, _as_made(store.provenance, prepare))
    names = _metrics(given.metrics, given.masks is not None)
    return evaluate(model, items, names, settings, {"maps": str(given.maps), **facts})


def _as_made(provenance: dict[str, Any], prepare: Any) -> Callable[[nn.Module], Explainer]:
    """What explained the images of a store, for any network."""

    def method(network: nn.Module) -> Explainer:
        for name, value in provenance["options"].items():
            if isinstance(value, str) and " sha256 " in value:  # a tensor's
                raise ValueError(f"option {name!r} of the job was a tensor, which the store does not hold: {value}")
        return Explainer(
            network,
            provenance["method"],
            layer=provenance["layer"],
            precision=provenance["precision"],
            channels_last=provenance["channels_last"],
            mean=prepare.mean,
            std=prepare.std,
            **provenance["options"],
        )

    return method
