"""How costs grow: methods over batch, image side, targets and image count; ops over batch, channels, side and targets.

    python -P benchmarks/growth/bench_growth.py [--only "grad_cam, batch"]

Methods: ResNet-18 with random weights, float32, beside its plain forward pass under `inference_mode` at the same
setting. Ops: float32, NCHW, beside `copy_` of the bytes they must move. Correctness first: everything against the
PyTorch references. `benchmarks/plots.py` draws docs/images/growth-*.svg from the JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam import ops
from fastcam._testing.models import torchvision_models
from fastcam.profiling.counting import count

METHODS = ("grad_cam", "lift_cam", "deep_lift", "lrp")
#: Axis -> the values it takes for methods, and what the others are meanwhile.
METHOD_AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8),
    "side": (64, 96, 128, 192),
    "targets": (1, 2, 4, 8),
    "images": (4, 8, 16),
}
USUAL = {"batch": 2, "side": 96, "targets": 1}
#: Images a call where the axis is how many there are.
CHUNK = 4
#: Op -> axis -> shapes of the features by the axis's values (for "targets": maps of 14 x 14 features).
OP_AXES: dict[str, dict[int, tuple[int, ...]]] = {
    "batch": {n: (n, 512, 14, 14) for n in (1, 2, 4, 8, 16, 32, 64)},
    "channels": {k: (8, k, 14, 14) for k in (64, 128, 256, 512, 1024, 2048)},
    "side": {side: (8, 256, side, side) for side in (7, 14, 28, 56, 112)},
    "targets": dict.fromkeys((1, 4, 16, 64), (8, 512, 14, 14)),
}


def method_rows(options: Any) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = torchvision_models().resnet18(weights=None).eval().to(options.device)
    for axis, values in METHOD_AXES.items():
        explainers = {method: fastcam.Explainer(model, method) for method in METHODS}
        for value in values:
            usual = USUAL | ({axis: value} if axis != "images" else {"batch": CHUNK})
            images = torch.randn(
                usual["batch"], 3, usual["side"], usual["side"], generator=torch.Generator().manual_seed(1)
            ).to(options.device)
            turns = value // CHUNK if axis == "images" else 1

            def forward(images: torch.Tensor = images, turns: int = turns) -> None:
                with torch.inference_mode():
                    for _ in range(turns):
                        model(images)

            targets = torch.arange(usual["targets"], device=options.device).expand(len(images), -1) * 7
            calls: dict[str, Callable[[], Any]] = {"forward": forward}
            matches = {"forward": (True, 0.0)}
            for method, explainer in explainers.items():
                if options.only not in f"{method}, {axis} {value}":
                    continue
                with fastcam.backend("reference"):
                    expected = explainer(images, targets).maps
                matches[method] = harness.agree(explainer(images, targets).maps, expected, 2e-3)
                calls[method] = repeated(explainer, images, targets, turns)
            if len(calls) == 1:
                continue
            times = harness.alternate(calls, options.rounds, options.device, warmup=1, budget=options.seconds)
            for name in calls:
                match, error = matches[name]
                label = f"{name}, {axis} {value}"
                multiple = harness.ratio(times, name, "forward")
                print(f"{label}: {multiple:.2f} x forward", flush=True)
                yield harness.row(
                    label, times[name], match, max_err=error, kind="method", subject=name, axis=axis,
                    value=value, times_forward=multiple,
                )  # fmt: skip


def repeated(explainer: Any, images: torch.Tensor, targets: torch.Tensor, turns: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(turns):
            explainer(images, targets)

    return call


def op_calls(shape: tuple[int, ...], targets: int, device: str) -> dict[str, Callable[[], Any]]:
    """The ops on random tensors of one shape; those that do not know targets only for a single one."""
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=draw).to(device) for _ in range(3))
    weights = torch.randn(shape[0], targets, shape[1], generator=draw).to(device)
    size = (4 * shape[2], 4 * shape[3])
    calls: dict[str, Callable[[], Any]] = {"cam_map": lambda: ops.cam_map_with_raw(a, weights, size=size)}
    if targets == 1:
        calls["channel_weights"] = lambda: ops.channel_weights(a, b)
        calls["rescale_multipliers"] = lambda: ops.rescale_multipliers(a, b, c)
        calls["relevance_split"] = lambda: ops.relevance_split(a, b, c, rule="alpha_beta")
    return calls


def op_rows(options: Any) -> Iterator[dict[str, Any]]:
    for axis, shapes in OP_AXES.items():
        for value, shape in shapes.items():
            targets = value if axis == "targets" else 1
            for name, call in op_calls(shape, targets, options.device).items():
                label = f"{name}, {axis} {value}"
                if options.only not in label:
                    continue
                with fastcam.backend("reference"):
                    expected = call()
                (one,) = count(call).ops
                scale = max(float(part.abs().max()) for part in tensors(expected))
                yield harness.op_row(
                    label, lambda call=call: tensors(call()), {}, tensors(expected), 1e-4 * scale, one.nbytes, options,
                    op=name, kind="op", subject=name, axis=axis, value=value, shape=shape, targets=targets,
                )  # fmt: skip


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """Floating-point results as a tuple."""
    many = result if isinstance(result, tuple) else (result,)
    return tuple(one for one in many if one.is_floating_point())


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="begin no turn of a group after so long (default: 2)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.time()
    rows = [*method_rows(options), *op_rows(options)]
    harness.write("growth", options.device, rows, options.out, seconds=round(time.time() - start), chunk=CHUNK, **USUAL)


if __name__ == "__main__":
    main()
