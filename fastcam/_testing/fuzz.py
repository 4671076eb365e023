"""Random calls of every op, as functions of a seed, and their comparison with the float64 oracles.

A case is made from (op, seed) alone. `run` calls one backend with it and compares values, dtypes, layouts and NaN by
the rules of `kernel_cases.py`, asks for the same bits again and for untouched inputs. A failure names its one-line
repetition:

    python -P -m fastcam._testing.fuzz OP SEED BACKEND

and `python -P -m fastcam._testing.fuzz all FIRST..LAST BACKEND` runs many. Triton's interpreter takes
TRITON_INTERPRET=1 in the environment.

Known failures are listed in WAIVERS, each with its reason; one that passes is an error, so that the list stays true.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastcam
from fastcam._dtypes import accumulation_dtype
from fastcam._testing import kernel_cases as checks
from fastcam._testing.imputation import check_impute_linear, holes
from fastcam._testing.ops import DTYPES, LAYOUTS, arranged
from fastcam.backends import implementation

__all__ = ["CASES", "WAIVERS", "Case", "case", "repetition", "run"]

#: (op, seed, backend) -> why it may fail
WAIVERS: Mapping[tuple[str, int, str], str] = {}


@dataclass(frozen=True)
class Case:
    """Arguments of an op and what checks its result for them."""

    arguments: tuple[Any, ...]
    check: Callable[..., None]
    options: dict[str, Any] = field(default_factory=dict)


UNDERFLOWING = ("tiny", "subnormal")


class Draw:
    """Random shapes, values and layouts of one case, all from one seed."""

    def __init__(self, op: str, seed: int) -> None:
        self.rng = random.Random(f"{op} {seed}")
        self.dtype = self.rng.choice(DTYPES)
        self.acc = accumulation_dtype(self.dtype)
        # One kind of magnitudes a case: sums over unlike ones hide what is small.
        self.kind = self.rng.choice(("plain",) * 4 + ("zeros", "ties", "constant", *UNDERFLOWING, "huge", "odd"))

    def either(self) -> torch.dtype:
        """The case's dtype or its accumulation dtype."""
        return self.rng.choice((self.dtype, self.acc))

    def values(self, *shape: int, dtype: torch.dtype | None = None, factors: int = 2) -> Tensor:
        """Values of the case's kind; the product of `factors` of them, summed up, stays finite."""
        rng, dtype = self.rng, dtype or self.dtype
        generator = torch.Generator().manual_seed(rng.randrange(2**40))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        info = torch.finfo(dtype)
        if self.kind == "zeros":
            x = x.masked_fill(torch.rand(shape, generator=generator) < rng.choice((0.1, 0.6, 1.0)), 0.0)
        elif self.kind == "ties":
            x = x.round()
        elif self.kind == "constant" and x.dim() > 2:
            # Of few digits, so that sums are exact: rounding errors of equal terms would add up instead of cancelling.
            x = (x.flatten(2)[..., :1] * 16).round() / 16
            x = x.expand(*shape[:2], math.prod(shape[2:])).reshape(shape).clone()
        elif self.kind == "tiny":
            x = x * math.sqrt(info.smallest_normal)
        elif self.kind == "subnormal":
            x = (x * 8).round() * info.smallest_normal * info.eps
        elif self.kind == "huge":
            largest = min(info.max, torch.finfo(accumulation_dtype(dtype)).max ** (0.8 / factors))
            x = (x * largest / 8).clamp(-largest, largest)
        x = x.to(dtype)
        if self.kind == "odd" and x.numel():
            for _ in range(rng.randint(1, 3)):
                x.view(-1)[rng.randrange(x.numel())] = rng.choice((math.nan, math.inf, -math.inf, -0.0))
        return x

    def laid(self, x: Tensor) -> Tensor:
        """x in some memory layout."""
        rng = self.rng
        if rng.random() < 0.4:
            return arranged(x, rng)
        if x.dim() < 3 or rng.random() < 0.3:
            return x
        return LAYOUTS[rng.choice(list(LAYOUTS))](x)

    def batched(self, x: Tensor) -> Tensor:
        """x, at times one image of it for all."""
        return x[:1].expand(x.shape) if self.rng.random() < 0.15 else x

    def image_shape(self) -> tuple[int, int]:
        """Height and width of features or images."""
        usual = ((1, 1), (7, 7), (1, 5), (8, 8), (13, 17), (14, 14), (3, 40), (2, 1))
        return self.rng.choice((*usual, (self.rng.randint(1, 20), self.rng.randint(1, 20))))

    def channels(self) -> int:
        """Of features: few, and around the widths of vectors and blocks."""
        return self.rng.choice((1, 3, 5, 16, 17, 63, 64, 65, 140, 300, self.rng.randint(1, 80)))

    def flat_shape(self) -> tuple[int, ...]:
        """(B,C,...) of any number of dimensions."""
        rng = self.rng
        rest = [rng.randint(1, 9) for _ in range(rng.randint(0, 3))]
        usual = ((1, 1), (3, 10), (4, 257), (2, 20, 16), (3, 20, 4, 4), (2, 64, 1, 1), (2, 8192), (1, 8193), (0, 4, 2))
        return rng.choice((*usual, (rng.randint(1, 4), rng.randint(1, 40), *rest)))

    def batch(self) -> int:
        """Images; none at times."""
        return self.rng.choice((0, 1, 1, 2, 2, 3))


def _cam_map(d: Draw) -> Case:
    rng, b, k, (h, w) = d.rng, d.batch(), d.channels(), d.image_shape()
    t = rng.choice((None, 1, 2, 6, 13))
    features = d.laid(d.values(b, k, h, w))
    reference = d.laid(d.values(rng.choice((1, b)), k, h, w)) if rng.random() < 0.5 else None
    shape = (b, *(() if t is None else (t,)), k)
    positional = rng.random() < 0.4
    weights = d.values(*shape, *((h, w) if positional else ()), dtype=d.either())
    relu, normalize = rng.random() < 0.7, rng.random() < 0.6
    size = rng.choice((None, (h, w), (1, 1), (9, 31), (2 * h, 3 * w), (50, 40)))
    if d.kind == "odd" and not normalize:
        size = None  # how far a value that is not finite spreads when it is resized is nobody's promise
    return Case((features, d.laid(weights), reference, relu, normalize, size), checks.check_cam_map)


def _channel_weights(d: Draw) -> Case:
    rng, b, k, (h, w) = d.rng, d.batch(), d.channels(), d.image_shape()
    t = rng.choice((None, 1, 3))
    mode = rng.choice(("mean", "sum", "xgrad", "grad_cam_pp"))
    features = d.values(b, k, h, w, factors=3)
    reference = d.laid(d.values(rng.choice((1, b)), k, h, w, factors=3)) if rng.random() < 0.5 else None
    multipliers = d.values(b, *(() if t is None else (t,)), k, h, w, dtype=d.either(), factors=3)
    return Case((d.laid(features), d.laid(multipliers), reference, mode), checks.check_channel_weights)


def _mask_by_features(d: Draw) -> Case:
    rng, b, k, (h, w) = d.rng, d.batch(), rng_small(d), d.image_shape()
    height, width = rng.choice(((h, w), (1, 1), (9, 31), (2 * h, 3 * w), (20, 7), (32, 32)))
    images = d.laid(d.values(b, rng.choice((1, 2, 3, 4, 17, 33)), height, width))
    features = d.laid(d.values(b, k, h, w, dtype=d.either()))
    start = rng.randint(0, b * k)
    count = rng.choice((None, rng.randint(0, b * k - start)))
    rows = b * k - start if count is None else count
    noise = d.laid(d.values(rows, height, width, dtype=d.either())) if rng.random() < 0.5 else None
    order = rng.choice(("resize_then_minmax", "minmax_then_resize"))
    options = {"noise": noise, "scale": rng.choice((1.0, 0.1, -2.5)), "order": order}
    return Case((images, features, start, count), checks.check_mask_by_features, options)


def rng_small(d: Draw) -> int:
    """Feature maps of an image that all are resized."""
    return d.rng.choice((1, 2, 5))


def _impute_linear(d: Draw) -> Case:
    rng, b, (h, w) = d.rng, d.batch(), (d.rng.randint(1, 20), d.rng.randint(1, 20))
    images = d.laid(_without_odd(d).values(b, rng.randint(1, 4), h, w, factors=3))
    missing = holes(max(b, 1), h, w, rng.randrange(2**31))[:b]
    missing = missing.mT.contiguous().mT if rng.random() < 0.3 else missing
    return Case((images, missing, 20), check_impute_linear)


def _perturb_by_rank(d: Draw) -> Case:
    rng, b, c, (h, w) = d.rng, d.batch(), d.rng.choice((1, 2, 3, 3, 5, 17, 64)), d.image_shape()
    images = d.laid(d.values(b, c, h, w))
    shape = (rng.choice((1, b)), c, *rng.choice(((1, 1), (h, w), (1, w), (h, 1))))
    baseline = d.values(*shape)
    generator = torch.Generator().manual_seed(rng.randrange(2**40))
    ranks = torch.rand((b, h * w), generator=generator).argsort(1).view(b, h, w) // rng.choice((1, 1, 3))
    spread = rng.choice((1, 1, 1, -1, 2**20, 2**40))
    ranks = (ranks * spread).to(torch.int64 if spread > 1 else rng.choice((torch.int32, torch.int64)))
    ranks = ranks.mT.contiguous().mT if rng.random() < 0.3 else d.batched(ranks)
    likely = (0, 1, h * w // 2, h * w, -5, 2**31, 2**62, rng.randint(0, h * w))
    steps = torch.tensor(rng.choices(likely, k=rng.randint(0, 11)), dtype=torch.int64)
    return Case((images, d.laid(baseline), ranks, steps), checks.check_perturb_by_rank, {"keep": rng.random() < 0.5})


def _overlay(d: Draw) -> Case:
    rng, b, c, (h, w) = d.rng, d.batch(), d.rng.choice((1, 3, 3)), d.image_shape()
    t = rng.choice((None, None, 1, 3))
    images, maps = d.values(b, c, h, w) * 0.5 + 0.5, d.values(b, *(() if t is None else (t,)), h, w, dtype=d.either())
    table = 255 * torch.rand(rng.choice((1, 2, 37, 256)), 3, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options = {"mean": [0.485, 0.456, 0.406], "std": rng.choice(([0.229, 0.224, 0.225], [0.25]))}
    arguments = (d.laid(images), d.laid(maps), table.to(d.acc), rng.choice((0.0, 0.3, 0.8, 1.0)), rng.random() < 0.5)
    return Case(arguments, checks.check_overlay, options)


def _rescale_multipliers(d: Draw) -> Case:
    shape = d.flat_shape() if d.rng.random() < 0.9 else (d.rng.choice((0, 7, 300)),)
    multipliers, inputs = d.values(*shape, dtype=d.either()), d.values(*shape)
    reference = d.values(d.rng.choice((1, shape[0])), *shape[1:])
    slope = d.rng.choice((0.0, 0.01, 0.2, 1.0, d.rng.uniform(-2, 2)))
    arguments = (d.batched(d.laid(multipliers)), d.laid(inputs), d.laid(reference), slope)
    return Case(arguments, checks.check_rescale_multipliers)


def _epsilon(d: Draw) -> float:
    return d.rng.choice((0.0, 1e-9, 1e-6, 0.25, d.rng.uniform(0, 100)))


def _relevance_divide(d: Draw) -> Case:
    shape = d.flat_shape()
    relevance, divisor, factor = (d.laid(d.values(*shape)) for _ in range(3))
    return Case(
        (d.batched(relevance), divisor, d.rng.choice((None, factor)), _epsilon(d)), checks.check_relevance_divide
    )


def _relevance_add(d: Draw) -> Case:
    shape = d.flat_shape()
    relevance, first, second, factor = (d.laid(d.values(*shape, factors=3)) for _ in range(4))
    arguments = (relevance, first, d.batched(second), d.rng.choice((None, factor)), _epsilon(d))
    return Case(arguments, checks.check_relevance_add)


def _relevance_split(d: Draw) -> Case:
    rng, shape = d.rng, d.flat_shape()
    positive = d.values(*shape, factors=3).abs()
    output = torch.minimum(d.values(*shape, factors=3), positive)
    if output.numel():
        some = slice(rng.randrange(5), None, rng.randint(3, 9))  # cancellations of which only rounding is left
        output.view(-1)[some] = positive.view(-1)[some] * (1 - rng.choice((0, 3, 6, 20)) * torch.finfo(d.dtype).eps)
    relevance, factor = d.laid(d.values(*shape, factors=3)), d.laid(d.values(*shape, factors=3))
    options = {
        "rule": rng.choice(checks.RULES),
        "first": rng.choice((0.0, 1.0, 2.0, rng.uniform(0, 10))),
        "second": rng.choice((0.0, 1.0, rng.uniform(0, 10))),
        "epsilon": _epsilon(d),
    }
    arguments = (d.batched(relevance), d.laid(output), d.laid(positive), rng.choice((None, factor)))
    return Case(arguments, checks.check_relevance_split, options)


def _relevance_budgets(d: Draw) -> Case:
    relevance = d.laid(d.values(*d.flat_shape()))
    return Case((d.batched(d.rng.choice((relevance, relevance.abs()))),), checks.check_relevance_budgets)


def _relevance_equilibrium(d: Draw) -> Case:
    rng, (b, *rest) = d.rng, d.flat_shape()
    relevance, divisors = d.values(b, *rest), d.values(3 * b, *rest)
    wide = relevance.double().flatten(1)
    budgets = torch.stack([wide.clamp(min=0).sum(1), -wide.clamp(max=0).sum(1)], 1)
    if rng.random() < 0.3:
        budgets = budgets * torch.tensor([rng.choice((0.0, 1.0, 100.0)), rng.choice((0.0, 1.0))])
    ratio = rng.choice((0.0, 1.0, 2.0, rng.uniform(0, 9)))
    arguments = (d.batched(d.laid(relevance)), budgets.to(d.acc), d.laid(divisors), ratio)
    return Case(arguments, checks.check_relevance_equilibrium)


def _relevance_combine(d: Draw) -> Case:
    rng, (b, *rest) = d.rng, d.flat_shape()
    if d.kind in UNDERFLOWING:  # where a product vanishes, it is not counted
        d.kind = "plain"
    budgets = torch.ones(b, 2, dtype=d.acc)
    if b and rng.random() < 0.3:
        budgets[rng.randrange(b)] = rng.choice((0.0, 1e-3, math.nan))
    arguments = (d.batched(d.laid(d.values(b, *rest))), d.laid(d.values(3 * b, *rest)), budgets)
    return Case(
        (*arguments, rng.random() < 0.7, rng.choice((0.0, 0.5, rng.uniform(0, 2)))), checks.check_relevance_combine
    )


def _similarity_weights(d: Draw) -> Case:
    rng, rows = d.rng, d.rng.choice((0, 1, 1, 2, 3, 5))
    channels = rng.choice((1, 2, 7, 16, 31, 64, 129, 512, 1024, 1025, rng.randint(1, 300)))
    pair = [d.laid(d.values(rng.choice((rows, rows, 1)), channels)) for _ in range(2)]
    if rng.random() < 0.2:
        pair = list(torch.broadcast_tensors(*pair))
    switches = (rng.choice(checks.TERMS), rng.choice(checks.WEIGHTINGS), rng.random() < 0.5)
    return Case((*pair, *switches), checks.check_similarity_weights)


def _without_odd(d: Draw) -> Draw:
    """What NaN and infinity do to gradients and to solutions of systems is tested where it is promised."""
    d.kind = "plain" if d.kind == "odd" else d.kind
    return d


def _lfi_tensors(d: Draw, factors: int = 2) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
    b, k, (h, w) = d.batch(), d.channels(), d.image_shape()
    features = d.values(b, k, h, w, factors=factors)
    grey, importance = (d.values(*shape, dtype=d.either(), factors=factors) for shape in ((b, 1, h, w), (b, k)))
    return features, grey, importance, b, k, h, w


def _lfi_mask(d: Draw) -> Case:
    features, grey, *_ = _lfi_tensors(d)
    return Case((d.laid(features), d.laid(grey)), checks.check_lfi_mask)


def _lfi_mask_backward(d: Draw) -> Case:
    features, grey, _, *shape = _lfi_tensors(_without_odd(d), 4)
    return Case((d.laid(d.values(*shape, factors=4)), d.laid(features), d.laid(grey)), checks.check_lfi_mask_backward)


def _lfi_attend(d: Draw) -> Case:
    features, _, importance, *_ = _lfi_tensors(d)
    return Case((d.laid(features), d.laid(importance), d.rng.choice(("raw", "zeros"))), checks.check_lfi_attend)


def _lfi_attend_backward(d: Draw) -> Case:
    features, _, importance, b, k, h, w = _lfi_tensors(_without_odd(d), 4)
    constant_map = d.rng.choice(("raw", "zeros"))
    _, attention, raw = fastcam.reference.lfi_attend(features, importance, constant_map)
    maps = [d.values(b, 1, h, w, dtype=d.acc, factors=4) if d.rng.random() < 0.7 else None for _ in range(2)]
    arguments = (
        d.laid(d.values(b, k, h, w, factors=4)),
        *maps,
        d.laid(features),
        importance,
        attention,
        raw,
        constant_map,
    )
    return Case(arguments, checks.check_lfi_attend_backward)


CASES: dict[str, Callable[[Draw], Case]] = {
    "cam_map": _cam_map,
    "channel_weights": _channel_weights,
    "impute_linear": _impute_linear,
    "lfi_attend": _lfi_attend,
    "lfi_attend_backward": _lfi_attend_backward,
    "lfi_mask": _lfi_mask,
    "lfi_mask_backward": _lfi_mask_backward,
    "mask_by_features": _mask_by_features,
    "overlay": _overlay,
    "perturb_by_rank": _perturb_by_rank,
    "relevance_add": _relevance_add,
    "relevance_budgets": _relevance_budgets,
    "relevance_combine": _relevance_combine,
    "relevance_divide": _relevance_divide,
    "relevance_equilibrium": _relevance_equilibrium,
    "relevance_split": _relevance_split,
    "rescale_multipliers": _rescale_multipliers,
    "similarity_weights": _similarity_weights,
}


def case(op: str, seed: int) -> Case:
    """The case of this seed; tensors are on the CPU."""
    return CASES[op](Draw(op, seed))


def repetition(op: str, seed: int, backend: str) -> str:
    """The command that runs one case again."""
    prefix = "TRITON_INTERPRET=1 " if backend == "triton" and not torch.cuda.is_available() else ""
    return f"{prefix}python -P -m fastcam._testing.fuzz {op} {seed} {backend}"


def run(op: str, seed: int, backend: str, waivers: Mapping[tuple[str, int, str], str] = WAIVERS) -> None:
    """Run a case; AssertionError with its repetition where it fails, or passes although it is waived."""
    reason = waivers.get((op, seed, backend))
    try:
        _run(op, seed, backend)
    except Exception as error:
        if reason is None:
            raise AssertionError(f"{error}\nrepeat with: {repetition(op, seed, backend)}") from error
    else:
        if reason is not None:
            raise AssertionError(f"passes now, remove its waiver ({reason}): {repetition(op, seed, backend)}")


def _run(op: str, seed: int, backend: str) -> None:
    made = case(op, seed)
    device = "cuda" if torch.cuda.is_available() and backend in ("cuda", "triton") else "cpu"
    arguments = [_moved(x, device) for x in made.arguments]
    options = {name: _moved(x, device) for name, x in made.options.items()}
    with fastcam.backend(backend):
        call = implementation(op, device)
    results = [_listed(call(*arguments, **options)) for _ in range(2)]
    got = results[0][0] if len(results[0]) == 1 else results[0]
    try:
        made.check(got, *made.arguments, **made.options)
    except AssertionError:
        draw = Draw(op, seed)
        if draw.kind not in UNDERFLOWING:
            raise
        # Triton 3.7's interpreter converts to subnormal bfloat16 wrongly, GPUs do not.
        beyond = backend == "triton" and device == "cpu" and draw.dtype == torch.bfloat16
        if not beyond and not _as_lossy_as_the_reference(op, made, got):
            raise
    for first, second in zip(*results, strict=True):
        assert torch.equal(_bits(first), _bits(second)), "another result on the second run"
    fresh, again = _tensors(arguments, options), _tensors(case(op, seed).arguments, case(op, seed).options)
    for x, before in zip(fresh, again, strict=True):
        assert torch.equal(_bits(x.cpu()), _bits(before)), "an input was changed"
        shared = {r.untyped_storage().data_ptr() for r in results[0] if r.numel()}
        assert not x.numel() or x.untyped_storage().data_ptr() not in shared, "a result shares memory with an input"


def _as_lossy_as_the_reference(op: str, made: Case, got: Any) -> bool:
    """Whether the reference in the same dtype lost it to underflow too, and the backend has what the reference has."""
    with fastcam.backend("reference"):
        expected = implementation(op, "cpu")(*made.arguments, **made.options)
    try:
        made.check(expected, *made.arguments, **made.options)
    except AssertionError:
        pairs = zip(_listed(got), _listed(expected), strict=True)
        return all(found.stride() == wanted.stride() and _near(found.cpu(), wanted) for found, wanted in pairs)
    return False


def _near(found: Tensor, wanted: Tensor) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    info = torch.finfo(wanted.dtype)
    least = 64 * info.smallest_normal * info.eps
    return torch.allclose(found, wanted, rtol=64 * info.eps, atol=least, equal_nan=True)


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _tensors(arguments: Any, options: dict[str, Any]) -> list[Tensor]:
    return [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]


def _bits(x: Tensor) -> Tensor:
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return x.contiguous().view(words[x.element_size()])


def main(arguments: list[str]) -> int:
    """OP|all SEED|FIRST..LAST BACKEND[,BACKEND]; prints failures, returns how many there are."""
    names, seeds, backends = arguments
    first, _, last = seeds.partition("..")
    start, failed, done = time.monotonic(), 0, 0
    for op in CASES if names == "all" else names.split(","):
        for seed in range(int(first), int(last or first) + 1):
            for backend in backends.split(","):
                done += 1
                try:
                    run(op, seed, backend)
                except AssertionError as error:
                    failed += 1
                    print(error, flush=True)
    print(f"{done} cases, {failed} failed, {time.monotonic() - start:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
