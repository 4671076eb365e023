"""Who watches a call: the one place where a profiler looks into the pipeline.

The pipeline names its stages with `stage(...)`, and `backends.implementation` hands out ops. With no watcher either is
one look-up of a context variable. A watcher sees the calls of its own thread or task only; graphs of `torch.compile`
run ops without asking here, so nothing is seen inside them.

Stages: "trunk" (the network up to the layer, at every run), "head" (from the layer to the scores, with the analysis of
the head), "rules" (the method's formula: gradients, multipliers, relevance, its own masks), "post" (map, ReLU, resize,
scaling, the check for what is not finite). They nest; time belongs to the innermost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

__all__ = ["STAGES", "Watcher", "current", "stage", "watched_by"]

STAGES = ("trunk", "head", "rules", "post")


class Watcher(Protocol):
    """What is told of a call as it happens, in its own thread."""

    def enter(self, stage: str) -> None:
        """A stage begins."""

    def leave(self, stage: str) -> None:
        """The stage entered last ends, by a result or by an exception."""

    def op(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Op `name` is called: the watcher calls `call(*args, **kwargs)` and returns what it gives."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("fastcam_watcher", default=None)
current = _WATCHER.get


class stage:
    """`with stage(name):` around the code of a stage."""

    __slots__ = ("_name", "_watcher")

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        self._watcher = _WATCHER.get()
        if self._watcher is not None:
            self._watcher.enter(self._name)

    def __exit__(self, *error: object) -> None:
        if self._watcher is not None:
            self._watcher.leave(self._name)


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of the calls in this block (this thread or task only)."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)
