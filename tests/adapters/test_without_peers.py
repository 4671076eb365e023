"""The adapters' own part, which needs none of the libraries they stand in for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fastcam

PACKAGES = {
    "grad_cam": ("pytorch_grad_cam", "grad-cam"),
    "torchcam": ("torchcam", "torchcam"),
    "captum": ("captum", "captum"),
    "zennit": ("zennit", "zennit"),
    "quantus": ("quantus", "quantus"),
}


@pytest.mark.parametrize("adapter", PACKAGES)
def test_a_missing_library_ends_in_the_command(adapter, monkeypatch):
    module, package = PACKAGES[adapter]
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"fastcam.adapters.{adapter}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}$"):
        importlib.import_module(f"fastcam.adapters.{adapter}")
    with pytest.raises(ImportError, match=f"pip install {package}$"):
        fastcam.adapters.accelerate(module)


def test_an_unknown_library():
    with pytest.raises(ValueError, match=r"no adapter for 'torch_cam'; did you mean 'torchcam'\? libraries: captum, "):
        fastcam.adapters.accelerate("torch_cam")


def test_importing_fastcam_imports_none_of_them():
    code = "import sys, fastcam, fastcam.adapters; print([m for m in sys.argv[1:] if m in sys.modules])"
    names = [module for module, _ in PACKAGES.values()]
    done = subprocess.run([sys.executable, "-P", "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def library(monkeypatch):
    """A stand-in for a library with an adapter: two classes, one made by inheritance alone, and a function."""
    source = """
class Base:
    def __init__(self, x):
        self.x = x
class Derived(Base):
    pass
class FastBase(Base):
    pass
class FastDerived(Derived):
    def __init__(self, x, *, more=0):
        super().__init__(x + more)
def explain():
    return "slow"
def fast():
    return "fast"
REPLACES = {Base: FastBase, Derived: FastDerived, explain: fast}
"""
    spec = importlib.util.spec_from_loader("standin_library", loader=None)
    module = importlib.util.module_from_spec(spec)
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "standin_library", module)
    monkeypatch.setitem(sys.modules, "fastcam.adapters.standin", module)
    monkeypatch.setitem(fastcam.adapters._accelerate._ADAPTERS, "standin_library", "standin")
    return module


def test_classes_and_functions_are_swapped_and_restored(library):
    before = {name: dict(vars(value)) for name, value in vars(library).items() if isinstance(value, type)}
    mine = type("Mine", (library.Derived,), {})
    imported = library.Derived  # as `from library import Derived` leaves it
    with fastcam.adapters.accelerate("standin_library") as acceleration:
        assert repr(acceleration) == "Acceleration('standin_library', active)"
        assert type(imported(1)) is library.FastDerived
        assert imported(1, more=2).x == 3
        assert type(library.Base(5)) is library.FastBase
        assert library.Base(5).x == 5
        assert type(mine(7)) is mine
        assert mine(7).x == 7
        assert library.explain() == "fast"
    assert type(library.Derived(1)) is library.Derived
    assert library.explain() == "slow"
    assert {name: dict(vars(value)) for name, value in vars(library).items() if isinstance(value, type)} == before


def test_the_last_of_several_uses_restores(library):
    first, second = (fastcam.adapters.accelerate("standin_library") for _ in range(2))
    first.restore()
    first.restore()
    assert type(library.Base(1)) is library.FastBase
    second.restore()
    assert type(library.Base(1)) is library.Base
    with pytest.raises(RuntimeError, match="stop"), fastcam.adapters.accelerate("standin_library"):
        raise RuntimeError("stop")
    assert type(library.Base(1)) is library.Base
