"""Triton's `lfi_attend` under the interpreter. Oracle and tolerances: `fastcam/_testing/kernel_cases.py`."""

import importlib

import pytest
import torch

from fastcam._testing.kernel_cases import LAYOUTS, check_lfi_attend, lfi_arguments, lfi_attend_oracle, lfi_many_channels

kernel = importlib.import_module("fastcam.kernels.lfi_attend")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(*arguments):
    check_lfi_attend(kernel.launch(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_layouts_and_dtypes(wide, layout, dtype):
    check(*lfi_arguments("lfi_attend", (3, 35, 3, 7), dtype, layout, wide))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 70, 1, 1), (2, 3, 17, 16), (1, 5, 40, 31), (1, 2, 1, 1)], ids=str)
def test_shapes(shape, layout):
    check(*lfi_arguments("lfi_attend", shape, torch.float32, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "side"), [(512, 14), (2048, 7)])
def test_many_channels_cost_no_digits(channels, side, layout):
    features, importance = lfi_many_channels(channels, side, side, layout)
    attention, want = kernel.launch(features, importance)[1], lfi_attend_oracle(features, importance)[1]
    # The interpreter adds the 128 channels of a tile in order, where a GPU makes a tree.
    torch.testing.assert_close(attention.double(), want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (3, 3, 40, 33)], ids=str)
@pytest.mark.parametrize("constant_map", ["raw", "zeros"])
def test_constant_and_non_finite_maps(constant_map, shape):
    features, importance = lfi_arguments("lfi_attend", shape, torch.float32)
    features[2], importance[2] = 0.5, 1.0
    check(features, importance, constant_map)
    for odd in (torch.nan, torch.inf):
        features[0, 1, 2, 3], importance[0] = odd, 1.0
        check(features, importance, constant_map)
        assert kernel.launch(features, importance, constant_map)[1][0].isnan().all()


def test_empty():
    arguments = [x[:0] for x in lfi_arguments("lfi_attend", (2, 5, 4, 6), torch.float32)]
    found = kernel.launch(*arguments)
    shapes = [tuple(x.shape) for x in (found if isinstance(found, tuple) else (found,))]
    assert shapes == [(0, 5, 4, 6), (0, 1, 4, 6), (0, 1, 4, 6)]


def test_same_bits_again_and_in_any_batch():
    arguments = lfi_arguments("lfi_attend", (3, 70, 7, 7), torch.float32)
    together, again, alone = (kernel.launch(*x) for x in (arguments, arguments, [x[1:2] for x in arguments]))
    if not isinstance(together, tuple):
        together, again, alone = (together,), (again,), (alone,)
    for a, b, c in zip(together, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


def test_backend_reaches_the_launcher(monkeypatch):
    import fastcam
    from fastcam.ops.lfi_attend import lfi_attend

    calls = []
    arguments = lfi_arguments("lfi_attend", (2, 9, 5, 7), torch.float32)
    run = kernel._raise.run
    monkeypatch.setattr(kernel._raise, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    with fastcam.backend("triton"):
        got = lfi_attend(*arguments)
    assert calls
    with fastcam.backend("reference"):
        torch.testing.assert_close(got, lfi_attend(*arguments), rtol=1e-4, atol=1e-4)
