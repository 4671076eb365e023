"""What the adapters share: asking for the peer, and running the peer's own code without leaving traces."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastcam.program.state import evaluating, exclusive, keeping_buffers

__all__ = ["Handover", "fallback", "needing", "replaced", "untouched"]

log = logging.getLogger("fastcam")


@contextlib.contextmanager
def needing(package: str) -> Iterator[None]:
    """An ImportError inside ends in the command that installs the package."""
    try:
        yield
    except ImportError as error:
        message = f"this adapter stands in for {package}, which cannot be imported ({error}): pip install {package}"
        raise ImportError(message) from error


def fallback(name: str, module: Any, adapter: str) -> Any:
    """`adapter.name` for what the adapter does not replace: the peer's own object, with a log line."""
    if name.startswith("_") or not hasattr(module, name):
        raise AttributeError(f"module {adapter!r} has no attribute {name!r}, and neither has {module.__name__!r}")
    log.info("%s.%s is %s's own", adapter, name, module.__name__)
    return getattr(module, name)


class Handover:
    """Says, once for each reason, that a call goes to the peer's own code."""

    def __init__(self, name: str):
        self._name = name
        self._said: set[str] = set()

    def __call__(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            log.warning("%s runs the library's own code: %s", self._name, reason)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The peer's code may run the model inside; flags, buffers, gradients, attributes and hooks are put back after."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in parameters:
        p.grad = None
    modules = [(m, dict(vars(m)), dict(m._modules), _hooks(m)) for m in model.modules()]
    try:
        with exclusive, evaluating(model), keeping_buffers(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, requires, gradient in parameters:
            parameter.requires_grad_(requires)
            parameter.grad = gradient
        for module, attributes, children, hooks in modules:
            for name in [name for name in vars(module) if name not in attributes]:
                del vars(module)[name]
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
            for name, kept in hooks.items():
                held = getattr(module, name)
                for key in [key for key in held if key not in kept]:
                    del held[key]


def _hooks(module: nn.Module) -> dict[str, set[Any]]:
    names: list[str] = [name for name in vars(module) if name.endswith("_hooks")]
    return {name: set(getattr(module, name)) for name in names}


def replaced(instance: object, own: type, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that the user overrides, in a subclass of `own` or on the instance."""
    found: list[str] = []
    for name in names:
        if name in vars(instance) or getattr(type(instance), name, None) is not getattr(own, name, None):
            found.append(name)
    return found
