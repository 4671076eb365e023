"""`fastcam profile`: its arguments, what it prints, its exit status."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["main"]


def main(words: Sequence[str]) -> int:
    """Run the command; 0, or 1 where nothing could be measured, or 2 where the arguments are wrong.

    ImportError passes, for a package that is missing.
    """
    given = vars(_parser().parse_args(words))
    # The profiler's library otherwise announces each of its starts and stops on stderr; read at its first start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    from fastcam.profiling import profile

    threads, out = given.pop("threads"), given["out"]
    if threads:
        torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\s*(Setting (forward|backward)|Input Tensor \d)")  # Captum
            report = profile(**given, progress=True)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        print(f"fastcam profile: {error}", file=sys.stderr)
        return 2
    print(report)
    if out is not None:
        print(f"\nreport: {out}/profile.html (profile.json, profile.csv, ops.csv beside it)")
    return 0 if any(row["match"] for row in report.rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcam profile",
        description="What attribution costs on a model and this machine: images/s, multiples of the plain forward "
        "pass, where the time goes, memory, and bandwidth of every op, for each backend and beside installed peers.",
    )
    add: Callable[..., Any] = parser.add_argument
    specs = "torchvision:NAME, timm:NAME, hf:DIR_OR_NAME, testbed:NAME, module.path:factory or NAME.pt2"
    add("--model", required=True, metavar="SPEC", help=specs)
    add("--methods", required=True, type=_words, metavar="A,B", help="names (`fastcam methods` lists them)")
    add("--batch", type=_numbers, default=[1, 8], metavar="N,N", help="batch sizes (default: 1,8)")
    add("--precision", type=_words, default=["fp32"], metavar="P,P", help="of fp32, bf16, fp16, fp64 (default: fp32)")
    add("--backends", type=_words, default=["all"], metavar="B,B", help="names, or all (default): those that run here")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--out", metavar="DIR", help="folder of profile.json, profile.csv, ops.csv and profile.html")
    add("--peers", action="store_true", help="also the same methods in installed peer packages")
    add("--layer", metavar="NAME", help="module to explain at (default: each method's own choice)")
    add("--image-size", type=_number, metavar="N", help="height and width of the images (default: the model's, or 224)")
    add("--channels-last", action="store_true", help="run the network in channels_last layout")
    add("--rounds", type=_number, default=9, metavar="N", help="turns of the calls of a group (default: 9)")
    add(
        "--seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="begin no turn after so long (default: 20)",
    )
    add("--threads", type=_number, metavar="N", help="CPU threads (default: torch's choice)")
    add("--trace", action="store_true", help="a Chrome trace of one call of each row, in DIR/traces")
    add("--nvtx", action="store_true", help="one call of each row inside NVTX ranges, for `nsys profile`")
    return parser


def _words(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError("must name at least one")
    return found


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(word) for word in _words(text)]
