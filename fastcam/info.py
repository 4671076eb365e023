"""`python -m fastcam.info [--brief]`: versions, build, and which backend runs each op here, with reasons."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastcam
from fastcam import _extension

__all__ = ["collect", "main"]


def collect() -> dict[str, Any]:
    """Everything `main` prints, as data."""
    reason = _extension.why_not()
    return {
        "fastcam": fastcam.__version__,
        "location": str(Path(fastcam.__file__).parent),
        "shadowed": _shadowed(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "extension": reason or _extension.load().build_config(),
        "backends": fastcam.backends(),
    }


def _shadowed() -> str | None:
    """The installed copy that a checkout in the working directory hides, if any."""
    try:
        installed = metadata.distribution("fastcam").locate_file("fastcam")
    except metadata.PackageNotFoundError:
        return None
    running = Path(fastcam.__file__).resolve().parent
    other = Path(str(installed)).resolve()
    return str(other) if other.is_dir() and other != running else None


def main(arguments: list[str] | None = None) -> None:
    """Print the report; `--brief` is one line an op."""
    brief = "--brief" in (sys.argv[1:] if arguments is None else arguments)
    facts = collect()
    backends = facts.pop("backends")
    if not brief:
        for key, value in facts.items():
            print(f"{key}: {value}")
        for name, reason in backends["available"].items():
            print(f"backend {name}: {'available' if reason is None else 'no: ' + reason}")
        print(f"environment: {backends['environment'] or 'no fastcam switch set'}")
    if facts["shadowed"]:
        print(f"warning: this copy hides the installed one in {facts['shadowed']}; start Python with -P")
    for op, devices in backends["ops"].items():
        for device, report in devices.items():
            print(f"fastcam.ops.{op} on {device}: {report['auto']}")
            for name, reason in () if brief and report["auto"] != "reference" else report["reasons"].items():
                print(f"    not {name}: {reason}")


if __name__ == "__main__":
    main()
