"""The `fastcam` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastcam import _interrupt

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (default: the process's) and returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _interrupt.raised():
            return _dispatched(words)
    except KeyboardInterrupt:
        print("fastcam: interrupted", file=sys.stderr)
        return _interrupt.CODE
    except ImportError as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 1


def _dispatched(words: list[str]) -> int:
    if words[:1] == ["train-lficam"]:
        from fastcam.nn import train  # its parser shows defaults that stand there

        return train.main(words[1:], "fastcam train-lficam")
    if words[:1] in (["run"], ["merge"]):
        from fastcam.jobs import command

        return command.main(words)
    if words[:1] == ["evaluate"]:
        from fastcam.metrics import command as evaluation

        return evaluation.main(words[1:])
    if words[:1] == ["profile"]:
        from fastcam.profiling.command import main as profile

        return profile(words[1:])
    if words[:1] in (["show"], ["report"]):
        from fastcam.jobs import report, show

        return (show if words[0] == "show" else report).main(words)
    given = _parser().parse_args(words)
    return int(given.run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastcam", description="Attribution maps at the cost of a forward pass.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="run the methods on small real images: a table and a picture")
    demo.add_argument("--images", type=_positive, default=200, metavar="N", help="held-out images (default: 200)")
    demo.add_argument(
        "--out",
        default="fastcam-demo",
        metavar="DIR",
        help="folder of the picture and the maps, gone on with if it is there (default: %(default)s)",
    )
    demo.add_argument("--model", choices=("tiny_resnet", "tiny_vgg", "both"), default="both")
    demo.add_argument(
        "--methods",
        type=_methods,
        metavar="A,B",
        help="comma-separated names (default: all but the score_cam family, which takes minutes)",
    )
    demo.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    demo.set_defaults(run=_demo)

    commands.add_parser("run", help="explain every image of a data set into a store that can be resumed")
    commands.add_parser("merge", help="join the stores of a job's shards into one")
    commands.add_parser("evaluate", help="how good the maps of a job, or of a method on the testbed, are")
    commands.add_parser("show", help="pictures of a store's items: the image with its maps")
    commands.add_parser("report", help="a store as one page with thumbnails, filters and plots")
    commands.add_parser("train-lficam", help="train an LFI-CAM network on class folders of images, or the testbed")
    commands.add_parser("profile", help="what attribution costs on a model and this machine: a report")
    commands.add_parser("methods", help="list the methods with their sources").set_defaults(run=_list_methods)
    commands.add_parser("info", help="versions, build, backends, switches").set_defaults(run=_info)
    return parser


def _demo(given: argparse.Namespace) -> int:
    import torch

    from fastcam.testbed import demo

    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        report = demo.run(images=given.images, out=given.out, model=given.model, methods=given.methods)
    except demo.jobs.JobError as error:
        print(f"fastcam: {error}", file=sys.stderr)
        return 1
    print(report.text)
    print(f"\npicture: {report.picture}")
    return 0


def _list_methods(given: argparse.Namespace) -> int:
    import fastcam

    for name, facts in fastcam.methods().items():
        print(f"{name:<20} {facts['summary']} [{facts['source']}]")
    return 0


def _info(given: argparse.Namespace) -> int:
    from fastcam import info

    info.main()
    return 0


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return number


def _methods(text: str) -> list[str]:
    from fastcam.methods import get

    names = [name.strip() for name in text.split(",") if name.strip()]
    try:
        for name in names:
            get(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not names:
        raise argparse.ArgumentTypeError("names at least one method")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
