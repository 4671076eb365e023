"""Calls in which nothing is special reach the C++ op at once, all others go the general way. Oracle: the registered op,
bit for bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastcam
from fastcam import _extension, ops
from fastcam._library import SCHEMAS
from fastcam._testing.fuzz import CASES, case
from fastcam._watch import watched_by
from fastcam.backends import plain_call

pytestmark = pytest.mark.skipif(_extension.why_not() is not None, reason="extension not built")
OVERLOADS = {name.partition(".")[0]: name for name in SCHEMAS}  # the last is the one kernels have
F, G = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)


@pytest.fixture(autouse=True)
def backend_is_free():
    with fastcam.backend("auto"):
        yield


def results(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize("op", CASES)
def test_is_the_registered_op(op):
    packet, _, overload = OVERLOADS[op].partition(".")
    registered = getattr(getattr(torch.ops.fastcam, packet), overload or "default")
    plain = 0
    for seed in range(16):
        made = case(op, seed)
        rest = registered._schema.arguments[len(made.arguments) :]
        arguments = [*made.arguments, *(made.options.get(each.name, each.default_value) for each in rest)]
        found = plain_call(op, *arguments)
        if found is NotImplemented:
            continue
        plain += 1
        for mine, wanted in zip(results(found), results(registered(*made.arguments, **made.options)), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True, check_stride=True)
    assert plain > 1


class Subclass(torch.Tensor):
    pass


class Watcher:
    def op(self, name, call, args, kwargs):
        return call(*args, **kwargs)


SPECIAL = {
    "subclass": (F.as_subclass(Subclass), G),
    "gradient": (F.clone().requires_grad_(), G),
    "expanded": (F, G[:, :, :1, :1].expand_as(G)),
    "other dtype": (F.half(), G),
    "integers": (F.int(), G),
    "other device": (F.to("meta"), G.to("meta")),
    "wrong shape": (F, G[:1]),
    "no tensor": (F, None),
    "negated": (F, torch._neg_view(G)),
    "sparse": (F.to_sparse(), G),
}
PLACES = {
    "dispatch mode": TorchDispatchMode,
    "function mode": TorchFunctionMode,
    "watcher": lambda: watched_by(Watcher()),
    "reference": lambda: fastcam.backend("reference"),
}


@pytest.mark.parametrize("what", [*SPECIAL, *PLACES, "a mode nobody knows", "too few arguments", "vmap"])
def test_special_calls_go_the_general_way(what):
    arguments, place = SPECIAL.get(what, (F, G)), PLACES.get(what, nullcontext)
    mode = "median" if what == "a mode nobody knows" else "sum"
    assert plain_call("channel_weights", F, G, None, "sum") is not NotImplemented
    if what == "too few arguments":
        assert plain_call("channel_weights", *arguments) is NotImplemented
    elif what == "vmap":
        torch.func.vmap(lambda f, g: _not_plain(f, g) or f)(F[None], G[None])
    else:
        with place():
            assert plain_call("channel_weights", *arguments, None, mode) is NotImplemented


def _not_plain(f, g):
    assert plain_call("channel_weights", f, g, None, "sum") is NotImplemented


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), float("inf"), "1"])
def test_numbers_no_op_takes_are_left_to_the_checks(epsilon):
    assert plain_call("relevance_divide", F, G, None, epsilon) is NotImplemented
    with pytest.raises((ValueError, TypeError), match="relevance_divide: epsilon must"):
        ops.relevance_divide(F, G, None, epsilon)


def test_gradients_may_be_wanted_where_none_are_recorded():
    wanting = F.clone().requires_grad_()
    with torch.no_grad():
        assert plain_call("channel_weights", wanting, G, None, "sum").equal(ops.channel_weights(F, G, None, "sum"))
    parameter = torch.nn.Parameter(F, requires_grad=False)
    assert plain_call("channel_weights", parameter, G, None, "sum") is not NotImplemented
