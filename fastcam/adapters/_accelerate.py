"""Other libraries' classes, replaced where they stand."""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Acceleration", "accelerate"]

#: The library's importable name -> module of its adapter.
_ADAPTERS = {name: name for name in ("torchcam", "captum", "zennit", "quantus")} | {"pytorch_grad_cam": "grad_cam"}

_lock = threading.RLock()
_uses: dict[str, int] = {}
_undo: dict[str, list[Callable[[], None]]] = {}


class Acceleration:
    """A library that is accelerated until `restore()` or the end of the `with` block."""

    def __init__(self, library: str):
        self.library = library
        self._active = True

    def restore(self) -> None:
        """Give the library its own classes back, unless another acceleration of it is still in use; safe to repeat."""
        with _lock:
            if not self._active:
                return
            self._active = False
            _uses[self.library] -= 1
            if not _uses[self.library]:
                for undo in reversed(_undo.pop(self.library)):
                    undo()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Acceleration({self.library!r}, {'active' if self._active else 'restored'})"


def accelerate(library: str) -> Acceleration:
    """Let a library's own classes make fastcam's adapters from here on, whoever imported them and however.

        with fastcam.adapters.accelerate("pytorch_grad_cam"):
            cam = GradCAM(model, [model.layer4])          # fastcam.adapters.grad_cam.GradCAM

        fastcam.adapters.accelerate("pytorch_grad_cam")   # or for the rest of the process; `.restore()` undoes it

    library  "pytorch_grad_cam", "torchcam", "captum", "zennit" or "quantus", by import name

    Objects made before stay what they are, and so do objects of the user's own subclasses, whose overrides run in the
    library's code. Objects made meanwhile stay accelerated afterwards. It may be nested and called from any thread;
    what counts is the whole process, so other threads' new objects are accelerated too.

    Raises ValueError for another library, ImportError where it is not installed.
    """
    if library not in _ADAPTERS:
        close = difflib.get_close_matches(str(library), _ADAPTERS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no adapter for {library!r}; {hint}libraries: {', '.join(sorted(_ADAPTERS))}")
    adapter = importlib.import_module(f"fastcam.adapters.{_ADAPTERS[library]}")
    with _lock:
        if not _uses.get(library):
            undo = _undo[library] = []
            for theirs, ours in adapter.REPLACES.items():
                undo.append(_swap_class(theirs, ours) if isinstance(theirs, type) else _swap_function(theirs, ours))
        _uses[library] = _uses.get(library, 0) + 1
    return Acceleration(library)


def _swap_class(theirs: Any, ours: Any) -> Callable[[], None]:
    """Objects of exactly `theirs` become objects of its subclass `ours` while they are made."""
    own = theirs.__dict__.get("__init__")
    original = theirs.__init__

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is theirs:
            self.__class__ = ours
            self.__init__(*args, **kwargs)
        else:
            original(self, *args, **kwargs)

    theirs.__init__ = made

    def undo() -> None:
        if own is None:
            del theirs.__init__
        else:
            theirs.__init__ = own

    return undo


def _swap_function(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[[], None]:
    """Modules of the library that hold `theirs` under its name hold `ours`."""
    name, root = theirs.__name__, theirs.__module__.partition(".")[0]
    holders = [
        module
        for key, module in list(sys.modules.items())
        if key.partition(".")[0] == root and vars(module).get(name) is theirs
    ]
    for module in holders:
        setattr(module, name, ours)

    def undo() -> None:
        for module in holders:
            setattr(module, name, theirs)

    return undo
