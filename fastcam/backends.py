"""Which implementation of an op runs: chosen per call, explained on request.

`auto` takes the fastest implementation usable for the tensor's device and falls back to the PyTorch reference with one
log line per (op, device); under `FASTCAM_STRICT=1` it raises instead. A backend forced by `fastcam.backend(...)` or
`FASTCAM_BACKEND` runs that implementation itself or raises, listing every candidate with its reason. Choices are
cached, so the hot path is one dictionary look-up. Compiled graphs always call `torch.ops.fastcam.*`, whose dispatcher
makes the `auto` choice.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from fastcam import _extension, _watch
from fastcam._library import LIBRARY

__all__ = ["BACKENDS", "backend", "backends"]

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
SWITCHES = ("FASTCAM_BACKEND", "FASTCAM_STRICT", "FASTCAM_CPU_ISA", "FASTCAM_RESULT_POOL", "TRITON_INTERPRET")
_AUTO_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_LOG = logging.getLogger("fastcam")


@dataclass(frozen=True)
class Op:
    """One op's implementations. `overload` is the registered op, `keys` the dispatch keys that C++ fills."""

    name: str
    overload: Any
    reference: Callable[..., Any]
    keys: frozenset[str]


_OPS: dict[str, Op] = {}
_TABLE: dict[tuple[str, str, str], Callable[..., Any]] = {}
_PLAIN_CALLS: dict[str, Callable[..., Any]] = {}


def _checked(name: str, source: str) -> str:
    if name in BACKENDS:
        return name
    close = difflib.get_close_matches(name, BACKENDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}{hint}")


_STRICT = os.environ.get("FASTCAM_STRICT", "0") not in ("", "0")
_DEFAULT: str = _checked(os.environ.get("FASTCAM_BACKEND") or "auto", "FASTCAM_BACKEND")
_CHOICE: ContextVar[str] = ContextVar("fastcam_backend", default=_DEFAULT)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for the eager calls in this block (this thread or task only)."""
    token = _CHOICE.set(_checked(name, "fastcam.backend"))
    try:
        yield
    finally:
        _CHOICE.reset(token)


def chosen() -> str:
    """The backend in force in this thread or task."""
    return _CHOICE.get()


def register(name: str, overload: Any, reference: Callable[..., Any]) -> None:
    """Make an op known; called once by each `fastcam/ops/<op>.py` after its schema, reference and fake are in place.

    Loads the extension first, so that its kernels are on their keys before the free CUDA key gets the Triton launcher
    (a second registration on one key would silently replace the first).
    """
    _extension.why_not()
    qualified = str(overload._schema.name) + (
        f".{overload._overloadname}" if overload._overloadname != "default" else ""
    )
    filled = torch._C._dispatch_has_kernel_for_dispatch_key
    _OPS[name] = Op(name, overload, reference, frozenset(key for key in ("CPU", "CUDA") if filled(qualified, key)))
    if "CPU" in _OPS[name].keys:
        _PLAIN_CALLS[name] = getattr(_extension.load(), name)
    if "CUDA" not in _OPS[name].keys:
        LIBRARY.impl(qualified.removeprefix("fastcam::"), _python_cuda_kernel(name), "CUDA")


def _python_cuda_kernel(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return (_TABLE.get((name, "cuda", "auto")) or _resolve(name, "cuda", "auto"))(*args, **kwargs)

    return kernel


def implementation(name: str, device_type: str) -> Callable[..., Any]:
    """The callable that the backend now in force runs for op `name` on tensors of `device_type`."""
    choice = _CHOICE.get()
    found = _TABLE.get((name, device_type, choice)) or _resolve(name, device_type, choice)
    watcher = _watch.current()
    if watcher is None:
        return found
    return lambda *args, **kwargs: watcher.op(name, found, args, kwargs)


def plain_call(name: str, *arguments: Any) -> Any:
    """Op `name` in C++ with all its arguments, if nothing about the call is special, else NotImplemented.

    What is special, `csrc/plain_calls.h` says. Special calls, and wrong ones, go the general way: through all checks,
    which the others are spared, like most of the way to the kernel.
    """
    call = _PLAIN_CALLS.get(name)
    if is_dynamo_compiling() or call is None or _watch.current() is not None or _CHOICE.get() not in ("auto", "cpp"):
        return NotImplemented
    return call(*arguments)


def _resolve(name: str, device_type: str, choice: str) -> Callable[..., Any]:
    op = _OPS[name]
    reasons: dict[str, str] = {}
    order = _AUTO_ORDER.get(device_type, ("reference",)) if choice == "auto" else (choice,)
    for candidate in order:
        found, reason = _candidate(op, candidate, device_type)
        if found is None:
            reasons[candidate] = reason
            continue
        if reasons:
            _report_fallback(name, device_type, candidate, reasons)
        _TABLE[name, device_type, choice] = found
        return found
    for candidate in BACKENDS[1:]:
        reasons.setdefault(candidate, _candidate(op, candidate, device_type)[1] or "usable")
    raise RuntimeError(
        f"backend {choice!r} cannot run fastcam.ops.{name} on {device_type} tensors: {_listed(reasons)}. "
        "Choose a usable one with fastcam.backend(...) or FASTCAM_BACKEND."
    )


def _report_fallback(name: str, device_type: str, taken: str, reasons: dict[str, str]) -> None:
    if taken != "reference":  # C++/CUDA and Triton are equals; only the slow reference is worth a line
        return
    if _STRICT:
        raise RuntimeError(
            f"FASTCAM_STRICT is set and fastcam.ops.{name} has no fast backend for {device_type} tensors: "
            f"{_listed(reasons)}"
        )
    _LOG.warning("fastcam.ops.%s on %s uses the slow PyTorch reference: %s", name, device_type, _listed(reasons))


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())


def _candidate(op: Op, candidate: str, device_type: str) -> tuple[Callable[..., Any] | None, str]:
    """(implementation, "") or (None, reason)."""
    if candidate == "reference":
        return op.reference, ""
    if candidate == "triton":
        return _triton(op, device_type)
    key = {"cpp": "CPU", "cuda": "CUDA"}[candidate]
    if device_type != key.lower():
        return None, f"runs on {key.lower()} tensors only"
    if key in op.keys:
        return op.overload, ""
    return None, _extension.why_not() or f"the extension has no {key} kernel for {op.name}"


def _triton(op: Op, device_type: str) -> tuple[Callable[..., Any] | None, str]:
    interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device_type != "cuda" and not (device_type == "cpu" and interpreting):
        return None, "runs on cuda tensors (cpu ones only under TRITON_INTERPRET=1)"
    return _triton_launcher(op.name)


@functools.cache
def _triton_launcher(name: str) -> tuple[Callable[..., Any] | None, str]:
    for module in ("triton", f"fastcam.kernels.{name}"):
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            cure = " (cure: pip install triton)" if module == "triton" else ""
            return None, f"importing {module} failed: {error}{cure}"
    return loaded.launch, ""


def backends() -> dict[str, Any]:
    """What is available here, and per op and device what `auto` would choose and why not the others.

    Keys: `chosen` (the backend in force), `strict`, `available` (backend -> None, or the reason why not, on this
    machine), `ops` (op -> device -> {"auto": backend, "reasons": {backend: reason}}), `extension` (the build record),
    `environment` (the switches that are set).
    """
    import fastcam.ops  # noqa: F401  (fills the table)

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    ops: dict[str, dict[str, Any]] = {}
    for name, op in _OPS.items():
        ops[name] = {}
        for device in devices:
            found = {candidate: _candidate(op, candidate, device) for candidate in BACKENDS[1:]}
            auto = next(candidate for candidate in _AUTO_ORDER[device] if found[candidate][0] is not None)
            reasons = {candidate: reason for candidate, (call, reason) in found.items() if call is None}
            ops[name][device] = {"auto": auto, "reasons": reasons}
    return {
        "chosen": chosen(),
        "strict": _STRICT,
        "available": {candidate: _availability(candidate, ops) for candidate in BACKENDS[1:]},
        "ops": ops,
        "extension": _extension.build_record(),
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
    }


def _availability(candidate: str, ops: dict[str, dict[str, Any]]) -> str | None:
    """None if the backend serves every op on some device of this machine, else its first reason."""
    if candidate in ("cuda", "triton") and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device is visible"
    for devices in ops.values():
        reasons = [report["reasons"].get(candidate) for report in devices.values()]
        if None not in reasons:
            return str(reasons[-1])
    return None
