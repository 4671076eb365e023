"""The measurement: every (method, batch, precision, backend) beside the plain forward pass, by turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastcam
from fastcam._watch import watched_by
from fastcam.methods import single

from . import counting, peers, plan
from .instrument import PARTS, Clock, Instrument, RangeWatcher, Split, clock_for
from .measure import agree, alternate, ratio
from .progress import Progress
from .report import Report
from .results import metadata, row, storable
from .roofs import Roofs

__all__ = ["LIMITS", "Report", "profile"]

#: Largest difference of two backends' maps (in [0, 1] or [-1, 1]) that counts as agreement, by the network's precision.
LIMITS = {"fp32": 2e-3, "bf16": 5e-2, "fp16": 2e-2, "fp64": 1e-6}
#: The same for a peer's maps: conventions of scaling differ by a little (docs/parity.md).
PEER_LIMIT = 2e-2
_TIMED = ("median_us", "iqr_us", "n")


@dataclass(frozen=True)
class Case:
    """One setting of the network: what is explained, and the plain forward pass it is held against."""

    batch: int
    precision: str
    images: Tensor
    targets: Tensor
    plain: Callable[[], Any]

    def forward(self) -> Any:
        with torch.inference_mode():
            return self.plain()

    @property
    def name(self) -> str:
        return f"b{self.batch} {self.precision}"


def profile(
    model: nn.Module | str,
    methods: Sequence[str],
    *,
    batch: Sequence[int] = (1, 8),
    precision: Sequence[str] = ("fp32",),
    backends: Sequence[str] | str = "all",
    device: str | None = None,
    out: str | Path | None = None,
    peers: bool = False,
    layer: str | None = None,
    image_size: int | None = None,
    channels_last: bool = False,
    rounds: int = 9,
    seconds: float = 20.0,
    trace: bool = False,
    nvtx: bool = False,
    progress: bool = False,
    title: str | None = None,
) -> Report:
    """What attribution costs on a model and this machine.

        report = fastcam.profiling.profile(model, ["lift_cam", "grad_cam", "lrp"], batch=[1, 8], out="profile")
        print(report)

    model       a module of images (B, C, H, W) to scores (B, classes), copied and never modified; or a name:
                "torchvision:resnet50", "testbed:tiny_resnet", "package.module:factory" (`fastcam.models.load_model`)
    methods     names of methods that explain single images
    batch       batch sizes; images are drawn from a fixed seed, the targets are the model's highest classes
    precision   of "fp32", "bf16", "fp16", "fp64", for the network under attribution and the plain one alike
    backends    names of backends, or "all": those that run on the device
    device      "cpu", "cuda" or "cuda:1"; None: cuda where there is one
    out         folder for profile.json, profile.csv, profile.html (and traces/); None: nothing is written
    peers       also the same method in installed peer packages, in float32
    layer       dotted name of the layer; None: each method's own choice
    image_size  height and width of the images; None: what the model was trained on where that is known, else 224
    channels_last  run the network in that layout, under attribution and plain
    rounds, seconds  turns of the calls of a group, and after how many seconds no further turn begins (at least 3)
    trace       a Chrome trace of one call of each row, with ranges for stages and ops
    nvtx        one call of each row inside NVTX ranges, for `nsys profile`
    progress    a progress bar on stderr, where that is a terminal
    title       what the report calls the model; None: its name or class

    Before the clock starts, each backend's maps are compared with the reference backend's (`LIMITS`); those that differ
    are reported and not timed. A method that fails on the model is reported with its error; the others go on.
    Errors: ValueError for unknown names, a device or backend that is not there, numbers below 1, a folder that cannot
    be written to; ImportError with the command that installs a model zoo, or matplotlib for the report's pictures.
    Cost: per method, batch, precision and backend about 2 `rounds` calls and three more for the counts.
    """
    sizes, precisions = plan.positive("batch", batch), plan.known("precision", precision, tuple(plan.DTYPES))
    (rounds,) = plan.positive("rounds", [rounds])
    if not seconds > 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    names = [single(name).name for name in dict.fromkeys(methods)]
    if not names:
        raise ValueError("methods must name at least one method")
    place = plan.device(device)
    chosen, notes = plan.backends(backends, place)
    if trace and out is None:
        raise ValueError("trace=True needs a folder to write to: pass out=")
    if out is not None:
        plan.writable(Path(out))
    watcher = RangeWatcher.nvtx() if nvtx else None
    network, given_title, known_size = plan.load(model)
    network = network.eval().to(place)
    if layer is not None:
        network.get_submodule(layer)  # raises with the name
    side = image_size or known_size or 224
    (side,) = plan.positive("image_size", [side])
    channels = plan.channels(network)
    run = _Run(network, place, chosen, peers, layer, channels_last, rounds, seconds, notes)
    run.trace_folder = Path(out) / "traces" if trace and out is not None else None
    run.nvtx = watcher
    bar = Progress(len(precisions) * len(sizes) * len(names), enabled=progress)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(max(sizes), channels, side, side, generator=generator).to(place, plan.own_dtype(network))
    rows: list[dict[str, Any]] = []
    here = torch.cuda.device(place) if torch.device(place).type == "cuda" else contextlib.nullcontext()
    with bar, here:
        for kind in precisions:
            plain = plan.converted(network, kind, channels_last)
            for size in sizes:
                case = run.case(images[:size], kind, plain)
                rows += run.measure(case, names, bar)
    document = {
        "metadata": metadata(place)
        | {
            "model": title or given_title,
            "image_size": side,
            "device": place,
            "layer": layer,
            "channels_last": channels_last,
            "backends": list(chosen),
            "parameters": sum(p.numel() for p in network.parameters()),
            "peak_gflops": {kind: run.roofs.gflops(kind) for kind in precisions},
            "copy_gbps": {str(size): gbps for size, gbps in sorted(run.roofs.copies.items())},
            "notes": run.notes,
        },
        "results": rows,
    }
    report = Report(storable(document))
    if out is not None:
        report.write(Path(out))
    return report


class _Run:
    """One profile: the model on its device, and what all groups of rows share."""

    def __init__(
        self,
        model: nn.Module,
        device: str,
        backends: Sequence[str],
        peers: bool,
        layer: str | None,
        channels_last: bool,
        rounds: int,
        seconds: float,
        notes: list[str],
    ):
        self.model = model
        self.device = device
        self.backends = backends
        self.peers = peers
        self.layer = layer
        self.channels_last = channels_last
        self.rounds = rounds
        self.seconds = seconds
        self.notes = notes
        self.roofs = Roofs(device)
        self.clock: Clock = clock_for(device)
        self.trace_folder: Path | None = None
        self.nvtx: RangeWatcher | None = None

    def case(self, images: Tensor, precision: str, plain: nn.Module) -> Case:
        with torch.no_grad():
            output = self.model(images)
        if not isinstance(output, Tensor) or output.ndim != 2:
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the model must give scores (B, classes) for images (B, C, H, W); it gives {kind}")
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        inputs = images.to(plan.DTYPES[precision]).contiguous(memory_format=layout)

        return Case(len(images), precision, images, output.argmax(1), lambda: plain(inputs))

    def measure(self, case: Case, methods: Iterable[str], bar: Progress) -> list[dict[str, Any]]:
        """Rows of all methods, led by that of the plain forward pass."""
        rows: list[dict[str, Any]] = []
        forwards: list[float] = []
        try:
            case.forward()
        except Exception as error:  # this precision on this device, or too large a batch; the others go on
            return [self._failed(case, "forward", "torch", error)]
        for method in methods:
            bar.step(f"{method} {case.name}")
            rows += self._group(case, method, forwards)
        if not forwards:
            return rows
        with torch.no_grad():  # inference_mode hides what composite operators are made of
            counts = counting.count(case.plain)
        first = {"method": "forward", "backend": "torch", "batch": case.batch, "precision": case.precision}
        numbers = {"max_err": 0.0, "times_forward": 1.0, "images_per_s": case.batch / statistics.median(forwards)}
        facts = self._counted(counts) | self._watched(f"forward {case.name}", case.forward)
        return [row(f"forward {case.name}", forwards, True, **first, **numbers, **facts), *rows]

    def _group(self, case: Case, method: str, forwards: list[float]) -> list[dict[str, Any]]:
        """The rows of one method; the seconds of the plain forward pass beside it are added to `forwards`."""
        subjects: dict[str, Callable[[], Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        try:
            explainer = self._explainer(method, case.precision)
            with fastcam.backend("reference"):
                first = explainer(case.images, case.targets)
        except Exception as error:
            return [self._failed(case, method, "-", error)]
        expected, exact = first.maps, self._exact(method, case)
        for backend in self.backends:
            call = _on(backend, explainer, case)
            try:
                found = call().maps
            except Exception as error:
                rows[backend] = self._failed(case, method, backend, error)
                continue
            rows[backend] = self._compared(case, method, backend, found, expected, LIMITS[case.precision])
            if exact is not None:
                rows[backend]["cosine_fp32"] = _cosine(found, exact)
            if rows[backend]["match"]:
                subjects[backend] = call
        if self.peers:
            self._add_peers(case, method, first.layer, expected, subjects, rows)
        if not subjects:
            return list(rows.values())
        times, splits = self._turns(case, subjects)
        forwards += times["forward"]
        for name, call in subjects.items():
            own = name in splits
            seconds = times[name]
            with torch.set_grad_enabled(not own):
                counts = counting.count(call)
            median = statistics.median(seconds)
            more = rows[name] | {"times_forward": ratio(times, name, "forward"), "images_per_s": case.batch / median}
            if "reference" in subjects and own and name != "reference":
                more["speedup"] = {"reference": ratio(times, "reference", name)}
            more |= self._counted(counts) | self._watched(more["name"], call)
            if own:
                more |= self._split(splits[name], median, ratio(times, f"{name} split", name) - 1, counts)
            rows[name] = row(seconds=seconds, **{key: more[key] for key in more if key not in _TIMED})
        for name in [n for n in subjects if n not in splits]:
            usual = next((b for b in reversed(self.backends) if b in subjects), None)
            if usual is not None:
                rows[name]["times_ours"] = ratio(times, name, usual)
        return list(rows.values())

    def _turns(
        self, case: Case, subjects: dict[str, Callable[[], Any]]
    ) -> tuple[dict[str, list[float]], dict[str, list[Split]]]:
        """Seconds of the forward pass, of every subject and of ours a second time under the instrument."""
        splits: dict[str, list[Split]] = {name: [] for name in subjects if name in self.backends}
        instrument = Instrument(self.clock)
        calls: dict[str, Callable[[], Any]] = {"forward": case.forward}
        for name, call in subjects.items():
            calls[name] = call
            if name in splits:
                calls[f"{name} split"] = _kept(instrument, call, splits[name])
        times = alternate(calls, self.rounds, self.device, warmup=1, budget=self.seconds)
        rounds = len(times["forward"])
        return times, {name: kept[-rounds:] for name, kept in splits.items()}

    def _explainer(self, method: str, precision: str) -> fastcam.Explainer:
        converted = None if plan.DTYPES[precision] == plan.own_dtype(self.model) else precision
        return fastcam.Explainer(
            self.model, method, layer=self.layer, precision=converted, channels_last=self.channels_last
        )

    def _exact(self, method: str, case: Case) -> Tensor | None:
        """Maps of the network as it is, where the case runs it in another precision."""
        if case.precision in ("fp32", "fp64"):
            return None
        explainer = fastcam.Explainer(self.model, method, layer=self.layer)
        return explainer(case.images, case.targets).maps

    def _add_peers(
        self,
        case: Case,
        method: str,
        layer: str,
        expected: Tensor,
        subjects: dict[str, Callable[[], Any]],
        rows: dict[str, dict[str, Any]],
    ) -> None:
        if case.precision != "fp32":
            self._note("peers run in fp32 only")
            return
        at = None if layer == "input" else layer
        for peer in peers.peer_calls(peers.Job(self.model, method, at, case.images, case.targets)):
            if peer.call is None:
                self._note(peer.reason)
                continue
            try:
                found = peers.comparable(peer.call(), expected)
            except Exception as error:
                rows[peer.peer] = self._failed(case, method, peer.peer, error)
                continue
            rows[peer.peer] = self._compared(case, method, peer.peer, found, expected, PEER_LIMIT)
            if rows[peer.peer]["match"]:
                subjects[peer.peer] = peer.call

    def _compared(
        self, case: Case, method: str, backend: str, found: Tensor, expected: Tensor, limit: float
    ) -> dict[str, Any]:
        match, error = agree(found, expected, limit)
        return self._empty(case, method, backend) | {"match": match, "max_err": error}

    def _failed(self, case: Case, method: str, backend: str, error: Exception) -> dict[str, Any]:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return self._empty(case, method, backend) | {"error": text}

    def _empty(self, case: Case, method: str, backend: str) -> dict[str, Any]:
        name = f"{method} {case.name} {backend}"
        facts = {"method": method, "backend": backend, "batch": case.batch, "precision": case.precision}
        return {"name": name, "median_us": None, "iqr_us": None, "n": 0, "match": False, "max_err": None, **facts}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _counted(self, counts: counting.Counts) -> dict[str, Any]:
        return {"op_calls": counts.calls, "flops": counts.flops, "bytes_all_ops": counts.nbytes}

    def _watched(self, name: str, call: Callable[[], Any]) -> dict[str, Any]:
        """Peak memory and, on CUDA, kernel launches; and the traces that were asked for."""
        found: dict[str, Any] = {"peak_mib": counting.peak_bytes(call, self.device) / 2**20}
        found["launches"] = counting.launches(call) if torch.device(self.device).type == "cuda" else None
        if self.trace_folder is not None:
            _trace(call, self.trace_folder / f"{name.replace(' ', '-')}.json", self.device)
        if self.nvtx is not None:
            torch.cuda.nvtx.range_push(name)
            with watched_by(self.nvtx):
                call()
            torch.cuda.nvtx.range_pop()
        return found

    def _split(
        self, splits: Sequence[Split], median: float, overhead: float, counts: counting.Counts
    ) -> dict[str, Any]:
        """Parts of a call that add up to its median: each part's share of the split calls, times the median."""
        whole = sum(split.total for split in splits)
        shares = {part: sum(split.parts[part] for split in splits) / whole for part in PARTS}
        found: dict[str, Any] = {
            "stages_us": {part: share * median * 1e6 for part, share in shares.items()},
            "instrument_overhead": overhead,
        }
        names = [one.name for one in counts.ops]
        if any([name for name, _ in split.ops] != names for split in splits):
            self._note("an op table was left out: the ops called differ from call to call")
            return found
        found["ops"] = []
        for name in dict.fromkeys(names):
            at = [index for index, one in enumerate(names) if one == name]
            seconds = statistics.median(sum(split.ops[i][1] for i in at) for split in splits)
            nbytes = sum(counts.ops[i].nbytes for i in at)
            copied = sum(self.roofs.copy_seconds(counts.ops[i].nbytes) for i in at)
            found["ops"].append(
                {
                    "op": name,
                    "calls": len(at),
                    "us": seconds * 1e6,
                    "bytes": nbytes,
                    "flops": sum(counts.ops[i].flops for i in at),
                    "gbps": nbytes / seconds / 1e9,
                    "pct_copy": 100 * copied / seconds,
                }
            )
        return found


def _kept(instrument: Instrument, call: Callable[[], Any], splits: list[Split]) -> Callable[[], None]:
    return lambda: splits.append(instrument.measure(call))


def _on(backend: str, explainer: fastcam.Explainer, case: Case) -> Callable[[], Any]:
    def call() -> Any:
        with fastcam.backend(backend):
            return explainer(case.images, case.targets)

    return call


def _trace(call: Callable[[], Any], path: Path, device: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, record_shapes=True) as found, watched_by(RangeWatcher.trace()):
        call()
    found.export_chrome_trace(str(path))


def _cosine(found: Tensor, exact: Tensor) -> float:
    """Mean over the batch of the cosine between two maps of an image."""
    return float(functional.cosine_similarity(found.flatten(1).double(), exact.flatten(1).double(), dim=1).mean())
