"""`fastcam run` and `fastcam merge`: parse, call, print, and say by the exit code what came of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from fastcam import _interrupt

from .options import Options
from .progress import Summary
from .writer import JobError

__all__ = ["main"]

CODES = (
    "exit codes: 0 all done, 3 some items failed (under torchrun 0), 2 wrong usage, 1 stopped by an error, "
    "130 interrupted"
)


def main(words: Sequence[str]) -> int:
    """Run `run ...` or `merge ...`; returns the exit code."""
    parser = _merge_parser() if words[0] == "merge" else _run_parser()
    given = parser.parse_args(words[1:])
    try:
        with _silent() if given.quiet else contextlib.nullcontext():
            summary: Summary = given.call(given)
    except KeyboardInterrupt:
        print("fastcam: interrupted; what was done is safe, go on with --resume", file=sys.stderr)
        return _interrupt.CODE
    except JobError as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 2 if error.usage else 1
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(summary.to_json()))
    elif not given.quiet:
        print(summary)
        if summary.failed:
            print(f"reasons: fastcam show {summary.store} --failed")
    if summary.exit_code == 3 and "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun takes any other code for a crash and ends the shards that are still at work.
        if not given.quiet:
            print(f"fastcam: exit code 0 in place of 3 ({summary.failed} items failed) under torchrun", file=sys.stderr)
        return 0
    return summary.exit_code


def _run(given: argparse.Namespace) -> Summary:
    from .job import run

    options = vars(given).copy()
    for name in ("call", "json"):
        options.pop(name)
    if len(given.images) == 1:
        options["images"] = given.images[0]
    if not given.quiet:
        logging.basicConfig(format="fastcam: %(message)s", level=logging.WARNING)
    options["quiet"] = given.quiet or given.json
    options["options"] = dict(given.options)
    return run(**options)


def _merge(given: argparse.Namespace) -> Summary:
    from .merging import merge

    return merge(given.out, given.stores)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Errors only: no warnings of this package, nor of those it uses."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcam run", description="Explain every image of a data set into a store.", epilog=CODES
    )
    add, default = parser.add_argument, {name: f.default for name, f in Options.__dataclass_fields__.items()}
    add(
        "--model",
        required=True,
        help="torchvision:NAME, timm:NAME, hf:NAME, testbed:NAME, package.module:factory or program.pt2",
    )
    add("--images", required=True, nargs="+", metavar="PATH",
        help="folders, .tar files or image files; one manifest (.csv, .parquet), .npy, .npz or .zarr")  # fmt: skip
    add("--out", required=True, help="the store, e.g. maps.zarr; {i} and {n} become the shard's numbers")
    add("--method", default=default["method"], help="see fastcam methods (default: %(default)s)")
    add("--option", dest="options", action="append", type=_option, default=[], metavar="NAME=VALUE",
        help="an option of the method; the value is JSON, or else text")  # fmt: skip
    add("--weights", help="safetensors file or checkpoint of tensors")
    add("--layer", help="dotted name (default: the last feature map)")
    add("--targets", default="predicted", help="predicted, topK, a class, labels, or a file of labels (see --labels)")
    add("--labels", help="file of labels (.csv, .tsv, .parquet, .npy), for --targets labels")
    add("--size", default="layer", help="of the stored maps: layer, input, N or HxW (default: %(default)s)")
    add("--dtype", default="float16", choices=("float16", "float32", "uint8"))
    add("--scores", default="all", choices=("all", "targets"), help="which of the model's scores to keep")
    add("--image-size", type=_size, help="N or HxW (default: the model's own)")
    add("--mean", type=_numbers, metavar="R,G,B")
    add("--std", type=_numbers, metavar="R,G,B")
    add("--interpolation", help="of resizing, e.g. bilinear or bicubic")
    add("--crop", type=_share, help="share of the shorter side that is kept, as in 0.875; squash: all, out of aspect")
    add("--batch-size", type=_count_or_auto, default="auto", metavar="N|auto")
    add("--precision", choices=("fp16", "bf16", "fp32", "fp64"))
    add("--channels-last", action="store_true")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--workers", type=int, help="decode threads (default: one a core, at most 16)")
    add("--threads", type=int, help="CPU threads of the network (default: torch's choice)")
    add("--engine", default="local", choices=("local", "ray"))
    add("--actors", type=int, help="Ray: workers that hold the model (default: what fits the cluster)")
    add("--cpus-per-actor", type=float, default=default["cpus_per_actor"])
    add("--gpus-per-actor", type=float, help="Ray: GPUs, or a fraction of one (default: 1 on CUDA)")
    add("--resume", action="store_true", help="go on with an existing store, or begin")
    add("--retry-failed", action="store_true", help="with --resume: items that failed are tried again")
    add("--limit", type=int, metavar="N", help="only the first N items")
    add(
        "--shard",
        metavar="i/n",
        help="only part i of n, counted from 0; auto: as torchrun or Slurm number this process",
    )
    add("--shard-rows", type=int, metavar="N", help="rows a shard file, a multiple of 16")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print the summary as one line of JSON, and no progress")
    parser.set_defaults(call=_run)
    return parser


def _merge_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcam merge", description="Join the stores of a job's shards into one.", epilog=CODES
    )
    parser.add_argument("out", help="the new store")
    parser.add_argument("stores", nargs="+", help="the stores of all shards, in any order")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the summary as one line of JSON")
    parser.set_defaults(call=_merge)
    return parser


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must read NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, one a channel, as in 0.5,0.5,0.5; got {text!r}") from None


def _share(text: str) -> float | str:
    try:
        return text if text == "squash" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a share, as in 0.875, or squash; got {text!r}") from None


def _size(text: str) -> int | tuple[int, ...]:
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be N or HxW, got {text!r}")
    return int(text) if len(parts) == 1 else tuple(int(part) for part in parts)


def _count_or_auto(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}")
    return text if text == "auto" else int(text)
