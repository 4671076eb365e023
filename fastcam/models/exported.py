"""Networks saved by `torch.export.save` as modules that can be explained."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_exported"]

_HOW = "torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"


def load_exported(path: str | Path) -> tuple[nn.Module, tuple[int, ...]]:
    """The network in a .pt2 file with its layers under their names, and the shape (C, H, W) it was exported for.

    What torch would unpickle is looked through first, and compiled libraries are refused; yet a .pt2 file is a program:
    take it only from where you would take source code.
    Raises ValueError for a file that is no exported program or holds more than tensors, for a fixed batch size, another
    signature than images -> scores, or an export in train mode.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no exported program at {str(path)!r}")
    _screen(path)
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an exported program: {str(error).splitlines()[0]}") from error
    shape = _input_shape(program, path)
    for node in program.graph.nodes:
        if node.op == "call_function" and _trains(node):
            raise ValueError(f"{path} was exported in train mode ({node.target}); export model.eval(): {_HOW}")
    module = torch.export.unflatten(program)
    # The unflattened module takes *args, which capture cannot trace.
    module.__class__ = type("ExportedNetwork", (type(module),), {"forward": _forward(type(module))})
    return module.eval(), shape


def _forward(base: type) -> Any:
    def forward(self: Any, images: Tensor) -> Any:
        return base.forward(self, images)  # type: ignore[attr-defined]

    return forward


def _input_shape(program: Any, path: Path) -> tuple[int, ...]:
    inputs = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim != 4:
        raise ValueError(f"{path} takes {len(inputs)} inputs; what can be explained takes one, images (B, C, H, W)")
    batch, *shape = values[0].shape
    if isinstance(batch, int):
        raise ValueError(f"{path} was exported for batches of exactly {batch} images; export it for any number: {_HOW}")
    if not all(isinstance(side, int) for side in shape):
        return ()
    return tuple(int(side) for side in shape)


def _trains(node: Any) -> bool:
    name = getattr(node.target, "__name__", "")
    flags = (
        {argument.name: place for place, argument in enumerate(node.target._schema.arguments)}
        if hasattr(node.target, "_schema")
        else {}
    )
    for flag in ("training", "train"):
        if flag in flags and ("batch_norm" in name or "dropout" in name):
            given = node.kwargs.get(flag, node.args[flags[flag]] if len(node.args) > flags[flag] else False)
            return given is True
    return False


def _screen(path: Path) -> None:
    """Raises ValueError where reading the archive would unpickle anything else than tensors, or load a library."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            pickled = {name for name in members if name.endswith(".pt")}
            for name in members:
                inner = name.partition("/")[2]
                last = name.rpartition("/")[2]
                if inner.startswith("data/aotinductor/"):
                    raise ValueError(f"{path} is refused: it holds a compiled library, which cannot be explained")
                if last.startswith(("custom_obj", "opaque_obj")):
                    raise ValueError(
                        f"{path} is refused: it holds pickled objects ({last}), and reading it would run code"
                    )
                if last.endswith("_config.json"):
                    entries = json.loads(archive.read(name)).get("config", {})
                    folder = name.rpartition("/")[0]
                    pickled |= {f"{folder}/{e['path_name']}" for e in entries.values() if e.get("use_pickle")}
            for name in sorted(pickled & set(members)):
                content = archive.read(name)
                if content:
                    torch.load(io.BytesIO(content), weights_only=True)
    except ValueError:
        raise
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} cannot be read as an exported program: {error}") from error
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is refused: it holds more than tensors, and reading it would run code ({first[:160]})"
        ) from None
