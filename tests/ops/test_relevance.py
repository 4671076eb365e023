"""The relevance_* ops of the reference and of C++ against the oracles of `fastcam/_testing/kernel_cases.py`."""

import pytest
import torch

import fastcam
from fastcam._testing.kernel_cases import LAYOUTS, RELEVANCE_CHECKS, RULES, features_like, relevance_arguments
from fastcam._testing.ops import DTYPES, usable_backends

FACTORED = ("relevance_divide", "relevance_add", "relevance_split")
SHAPES = [(1, 1), (70, 10), (2, 1500), (2, 8193), (2, 5, 8), (1, 2, 3, 4, 5), (2, 2, 1, 1), (3, 20, 4, 4), (2, 1, 5, 5)]


@pytest.fixture(params=usable_backends(), autouse=True)
def backend(request):
    with fastcam.backend(request.param):
        yield request.param


def check(op, *arguments, **options):
    RELEVANCE_CHECKS[op](getattr(fastcam.ops, op)(*arguments, **options), *arguments, **options)


def check_everything(op, shape, dtype, layout="contiguous"):
    tensors = relevance_arguments(op, shape, dtype, layout)
    for rule in RULES if op == "relevance_split" else [None]:
        options = {} if rule is None else {"rule": rule}
        check(op, *tensors, **options)
        if op in FACTORED:
            check(op, *tensors, features_like(shape, dtype, 9), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", RELEVANCE_CHECKS)
def test_shapes(op, dtype):
    for shape in SHAPES:
        check_everything(op, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", RELEVANCE_CHECKS)
def test_layouts(op, layout, dtype):
    check_everything(op, (2, 35, 3, 7), dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_numbers(epsilon, dtype):
    """In float64 none of them may have been rounded to float32 on its way."""
    tensors = {op: relevance_arguments(op, (2, 300), dtype) for op in RELEVANCE_CHECKS}
    for op in ("relevance_divide", "relevance_add"):
        check(op, *tensors[op], None, epsilon)
    for rule in RULES:
        numbers = {"first": 0.3, "second": 0.1, "epsilon": epsilon}
        check("relevance_split", *tensors["relevance_split"], rule=rule, **numbers)
    check("relevance_equilibrium", *tensors["relevance_equilibrium"], 0.3)
    check("relevance_combine", *tensors["relevance_combine"], epsilon > 0, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_values(dtype):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -0.5], dtype=dtype)
    x, y = torch.broadcast_tensors(odd[:, None], odd[None])
    budgets = features_like((7, 2), torch.float64 if dtype == torch.float64 else torch.float32).abs()
    budgets[0], budgets[1] = 0, torch.nan
    for epsilon in (0.0, 0.5):
        check("relevance_divide", x, y, None, epsilon)
        check("relevance_add", x, y, y.flip(1), None, epsilon)
        for rule in RULES:
            tensors = torch.broadcast_tensors(odd[:, None, None], odd[:, None], odd.abs())
            check("relevance_split", *tensors, rule=rule, epsilon=epsilon)
    check("relevance_budgets", x)
    check("relevance_equilibrium", x, budgets, torch.cat([y, y, y]))
    for shift in (False, True):
        check("relevance_combine", x, torch.cat([y, y, y]), budgets, shift, 0.5)


def test_equilibrium_of_an_image_all_but_gone():
    """The reciprocals of its budgets would be infinite."""
    small = torch.tensor([[1e-40, 0.0, -2e-40, 3e-41]])
    check("relevance_equilibrium", small, torch.tensor([[1.3e-40, 2e-40]]), torch.ones(3, 4))
