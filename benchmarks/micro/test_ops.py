"""Micro-cases of the CPU ops at launch-bound and typical shapes, under pytest-benchmark.

    make micro                                                  a table
    .venv/bin/pytest benchmarks/micro --benchmark-autosave      kept, for --benchmark-compare

Each case is checked against the reference before it is timed; the suites under benchmarks/ops have the baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcam
from fastcam import ops

SHAPES = {"launch": (1, 64, 7, 7), "typical": (8, 512, 14, 14)}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def other(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


#: Op -> (shape) -> call.
CASES: dict[str, Callable[[tuple[int, ...]], Callable[[], Any]]] = {}


def case(build: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    CASES[build.__name__] = build
    return build


@case
def cam_map(shape: tuple[int, ...]) -> Callable[[], Any]:
    a, w = draw(*shape), other(*shape[:2])
    return lambda: ops.cam_map(a, w, size=(56, 56))


@case
def channel_weights(shape: tuple[int, ...]) -> Callable[[], Any]:
    a, m = draw(*shape), other(*shape)
    return lambda: ops.channel_weights(a, m)


@case
def lfi_mask(shape: tuple[int, ...]) -> Callable[[], Any]:
    a, grey = draw(*shape), positive(shape[0], 1, *shape[2:])
    return lambda: ops.lfi_mask(a, grey)


@case
def lfi_attend(shape: tuple[int, ...]) -> Callable[[], Any]:
    a, importance = draw(*shape), positive(*shape[:2])
    return lambda: ops.lfi_attend(a, importance)


@case
def mask_by_features(shape: tuple[int, ...]) -> Callable[[], Any]:
    images, a = draw(1, 3, 56, 56), other(1, *shape[1:])
    return lambda: ops.mask_by_features(images, a, 0, 32)


@case
def rescale_multipliers(shape: tuple[int, ...]) -> Callable[[], Any]:
    m, x, r = draw(*shape), other(*shape), positive(*shape)
    return lambda: ops.rescale_multipliers(m, x, r)


@case
def relevance_divide(shape: tuple[int, ...]) -> Callable[[], Any]:
    r, z = draw(*shape), other(*shape)
    return lambda: ops.relevance_divide(r, z)


@case
def relevance_add(shape: tuple[int, ...]) -> Callable[[], Any]:
    r, a, b = draw(*shape), positive(*shape), positive(*shape) + 1
    return lambda: ops.relevance_add(r, a, b)


@case
def relevance_split(shape: tuple[int, ...]) -> Callable[[], Any]:
    r, z, p = draw(*shape), other(*shape), other(*shape) + positive(*shape)
    return lambda: ops.relevance_split(r, z, p, rule="alpha_beta")


@case
def relevance_budgets(shape: tuple[int, ...]) -> Callable[[], Any]:
    r = draw(*shape)
    return lambda: ops.relevance_budgets(r)


@case
def relevance_equilibrium(shape: tuple[int, ...]) -> Callable[[], Any]:
    r = draw(*shape)
    budgets, divisors = ops.relevance_budgets(r), positive(3 * shape[0], *shape[1:]) + 1
    return lambda: ops.relevance_equilibrium(r, budgets, divisors)


@case
def relevance_combine(shape: tuple[int, ...]) -> Callable[[], Any]:
    x = draw(*shape)
    parts, budgets = other(3 * shape[0], *shape[1:]), ops.relevance_budgets(x)
    return lambda: ops.relevance_combine(x, parts, budgets)


@case
def similarity_weights(shape: tuple[int, ...]) -> Callable[[], Any]:
    u, v = draw(shape[0], shape[1]), other(shape[0], shape[1])
    return lambda: ops.similarity_weights(u, v)


@pytest.mark.parametrize("regime", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark: Any, name: str, regime: str) -> None:
    call = CASES[name](SHAPES[regime])
    with fastcam.backend("reference"):
        expected = call()
    torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-4)
    benchmark.group = regime
    benchmark(call)
