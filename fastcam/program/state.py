"""What the user's model looks like from outside, and how to look at it without leaving a trace."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from fastcam import _extension

__all__ = [
    "evaluating",
    "exclusive",
    "fingerprint",
    "forward_hooked",
    "keeping_attributes",
    "keeping_buffers",
    "neutral_modes",
    "training",
    "unwrap",
    "without_autocast",
]

#: Held while a model is traced, run through a hook, or has its flags set: other threads would see it half changed, and
#: torch.export swaps the parameters of what it traces for stand-ins, which two traces at a time would lose.
exclusive = threading.RLock()

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_SCALARS = frozenset(_PLAIN)
_BOOKKEEPING = frozenset(vars(nn.Module()))


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and (Distributed)DataParallel's wrappers, whose parameters are the same."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # by name: importing the class would load the compiler
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module's `training` flag is False inside and what it was before outside, on every exit path.

    The flags are set one by one: `model.eval()` may be overridden by the user and do more than that.
    """
    trained = [module for module in model.modules() if module.training]
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True


@contextlib.contextmanager
def keeping_attributes(model: nn.Module) -> Iterator[None]:
    """Modules have the very objects as attributes that they had before, on every exit path: torch.export leaves copies
    of their lists, tuples and dicts."""
    kept = [(vars(m), {k: v for k, v in vars(m).items() if k not in _BOOKKEEPING}) for m in model.modules()]
    try:
        yield
    finally:
        for own, before in kept:
            own.update(before)


@contextlib.contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward pass writes or replaces are put back on every exit path."""
    kept = [
        (m, dict(m._buffers), {k: b.clone() for k, b in m._buffers.items() if b is not None}) for m in model.modules()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, buffers, contents in kept:
                module._buffers.update(buffers)
                for name, content in contents.items():
                    buffer = module._buffers[name]
                    if buffer is not None and not torch.equal(buffer, content):
                        buffer.copy_(content)


_DEVICES = ("cpu", "cuda")


def neutral_modes() -> contextlib.AbstractContextManager[None]:
    """No autograd graph is recorded inside, the tensors made are ordinary ones even under `inference_mode`, and of what
    dtype is the explainer's business, not `autocast`'s."""
    if torch.is_inference_mode_enabled() or any(map(torch.is_autocast_enabled, _DEVICES)):
        return _neutralised()
    return torch.no_grad()


@contextlib.contextmanager
def _neutralised() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Of what dtype tensors are is the explainer's business, not `autocast`'s."""
    with contextlib.ExitStack() as plain:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                plain.enter_context(torch.autocast(device, enabled=False))
        yield


def forward_hooked(model: nn.Module) -> str | None:
    """Dotted name of the first module with a forward hook of the user's, or None."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return name or type(module).__name__
    return None


def fingerprint(model: nn.Module) -> int:
    """A hash that changes when the computation the model describes changes: its modules, their settings, replaced
    methods, and which parameters exist; not the parameters' values.

    Settings are the plain values (numbers, strings, tuples and lists of them, dtypes, devices) and the callables among
    a module's attributes. A setting hidden in another object (a dict, a user's config class) is not seen.
    """
    return _outline(model)[0]


def training(model: nn.Module) -> bool:
    """Whether any of its modules is in train mode."""
    return _outline(model)[1]


def _outline(model: nn.Module) -> tuple[int, bool]:
    """`fingerprint` and `training`. Every explanation looks at all modules, so C++ does where it can."""
    if _extension.why_not() is None:
        how = _token, _tokens, _BOOKKEEPING, _SCALARS, _PLAIN, torch.Tensor
        found: tuple[int, bool] | None = _extension.load().outline(model, *how)
        if found is not None:
            return found
    settings: list[Any] = []
    modules = list(model.modules())
    for module in modules:
        _describe(module, settings)
    return hash(tuple(settings)), any(module.training for module in modules)


_tokens: dict[int, tuple[weakref.ref[nn.Module], int]] = {}
_counter = itertools.count()


def _token(module: nn.Module) -> int:
    """A number no other module ever has; `id` is given again once a module is gone."""
    known = _tokens.get(id(module))
    if known is None or known[0]() is not module:
        forget = functools.partial(_forget, id(module))
        known = _tokens[id(module)] = (weakref.ref(module, forget), next(_counter))
    return known[1]


def _forget(identity: int, reference: weakref.ref[nn.Module]) -> None:
    known = _tokens.get(identity)
    if known is not None and known[0] is reference:
        del _tokens[identity]


def _describe(module: nn.Module, found: list[Any]) -> None:
    """Adds what counts of one module."""
    found += (_token(module), type(module), bool(module._forward_hooks or module._forward_pre_hooks))
    for key, value in vars(module).items():
        if key in _BOOKKEEPING:
            continue
        if isinstance(value, _PLAIN):
            found += (key, type(value), value)
        elif isinstance(value, (tuple, list)):
            found += (key, *[(type(v), v) if type(v) in _SCALARS else id(v) for v in value])
        elif callable(value) or isinstance(value, torch.Tensor):
            found += (key, id(value))
    for key, parameter in module._parameters.items():
        found += (key, parameter is None)
    for key, child in module._modules.items():
        found += (key, None if child is None else _token(child))
