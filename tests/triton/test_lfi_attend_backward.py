"""Triton's `lfi_attend_backward` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_lfi_attend_backward, lfi_arguments

kernel = importlib.import_module("fastcam.kernels.lfi_attend_backward")
forward = importlib.import_module("fastcam.kernels.lfi_attend")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_lfi_attend_backward(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_layouts_and_dtypes(wide, layout, dtype):
    check(*lfi_arguments("lfi_attend_backward", (3, 35, 3, 7), dtype, layout, wide))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 70, 1, 1), (2, 3, 17, 16), (1, 5, 40, 31), (1, 2, 1, 1)], ids=str)
def test_shapes(shape, layout):
    check(*lfi_arguments("lfi_attend_backward", shape, torch.float32, layout))


@pytest.mark.parametrize("constant_map", ["raw", "zeros"])
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (3, 3, 40, 33), (3, 2, 1, 1)], ids=str)
def test_gradients_left_out_and_constant_maps(shape, given, constant_map):
    grad, *maps, features, importance, _, raw = lfi_arguments("lfi_attend_backward", shape, torch.float64)
    maps = [x if there else None for x, there in zip(maps, given, strict=True)]
    raw[0] = 0.75
    _, attention, _ = forward.launch(features, importance, constant_map)
    attention[0] = 0.75 if constant_map == "raw" else 0.0
    check(grad, *maps, features, importance, attention, raw, constant_map)


def test_gradient_in_another_order_than_the_features():
    grad, *rest = lfi_arguments("lfi_attend_backward", (2, 5, 4, 6), torch.float32)
    check(grad.contiguous(memory_format=torch.channels_last), *rest)
    rest[2] = rest[2].contiguous(memory_format=torch.channels_last)
    check(grad, *rest)


def test_empty():
    arguments = [x[:0] for x in lfi_arguments("lfi_attend_backward", (2, 5, 4, 6), torch.float32)]
    found = kernel.launch(*arguments)
    shapes = [tuple(x.shape) for x in (found if isinstance(found, tuple) else (found,))]
    assert shapes == [(0, 5, 4, 6), (0, 5)]


def test_same_bits_again_and_in_any_batch():
    arguments = lfi_arguments("lfi_attend_backward", (3, 70, 7, 7), torch.float32)
    together, again, alone = (kernel.launch(*x) for x in (arguments, arguments, [x[1:2] for x in arguments]))
    if not isinstance(together, tuple):
        together, again, alone = (together,), (again,), (alone,)
    for a, b, c in zip(together, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam
    from fastcam.ops.lfi_attend_backward import lfi_attend_backward

    calls = []
    arguments = lfi_arguments("lfi_attend_backward", (2, 9, 5, 7), torch.float32)
    run = kernel._share_out.run
    monkeypatch.setattr(kernel._share_out, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = lfi_attend_backward(*arguments)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, lfi_attend_backward(*arguments), rtol=1e-4, atol=1e-4)
