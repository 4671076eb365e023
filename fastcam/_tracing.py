"""Whether a graph is being traced rather than numbers computed.

While it is, tensors are stand-ins: nothing may be decided by their values, nothing made of them may outlive the trace,
and only plain ATen operators may run, in their PyTorch references.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from fastcam.backends import backend

__all__ = ["graph_holds_ops", "traced", "tracing", "transformed"]

_TRACING: ContextVar[bool] = ContextVar("fastcam_tracing", default=False)


def tracing() -> bool:
    """Whether this thread or task is inside `traced()`."""
    return _TRACING.get()


def graph_holds_ops() -> bool:
    """Whether an op is written into a compiler's graph as it is, its backend to be chosen when the graph runs."""
    compiler = torch.compiler
    return compiler.is_dynamo_compiling() or (compiler.is_compiling() and not tracing())


def transformed() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp, ...) is running the code."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """`tracing()` is true inside, and ops are their references."""
    token = _TRACING.set(True)
    try:
        with backend("reference"):
            yield
    finally:
        _TRACING.reset(token)
