"""`perturb_by_rank` against pixel-by-pixel choice in numpy, compared bit by bit: the op copies, it does not compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcam import ops
from fastcam._testing.kernel_cases import check_perturb_by_rank
from fastcam._testing.ops import DTYPES, LAYOUTS, OPCHECKED, make

OP = torch.ops.fastcam.perturb_by_rank.default
INTEGERS = (torch.int32, torch.int64)
COUNTS = torch.tensor([0, 3, 1, 40, 41, 7])


def ranks_of(batch: int, height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(height * width, generator=generator) for _ in range(batch)]
    return torch.stack(order).view(batch, height, width).to(dtype) if order else torch.zeros(0, height, width).to(dtype)


def check(*arguments, **options) -> None:
    """Values, dtype and layout, and that nothing but a fresh result came of it."""
    before = [x.clone() for x in arguments]
    result = ops.perturb_by_rank(*arguments, **options)
    check_perturb_by_rank(result, *arguments, **options)
    for tensor, kept in zip(arguments, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), kept.nan_to_num())
    inputs = {x.untyped_storage().data_ptr() for x in arguments if x.numel()}
    assert not result.numel() or result.untyped_storage().data_ptr() not in inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(backend, layout, dtype):
    images, baseline = make((2, 3, 9, 13), dtype, 1, layout), make((2, 3, 9, 13), dtype, 2, layout)
    counts = torch.tensor([0, 5, 60, 117, 1000])
    for integers in INTEGERS:
        ranks = ranks_of(2, 9, 13, 3, integers)
        check(images, baseline, ranks, counts)
        check(images, make((2, 3, 9, 13), dtype, 2), ranks.mT.contiguous().mT, counts, keep=True)
        check(images, baseline, ranks[:1, :, :1].expand(2, -1, 13), counts)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 1), (1, 3, 9, 13), (2, 3, 9, 1), (1, 3, 1, 13)], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_baselines_that_serve_several_pixels_or_images(backend, keep, shape, layout):
    images = make((2, 3, 9, 13), torch.float32, 1, layout)
    check(images, make(shape, torch.float32, 2), ranks_of(2, 9, 13), torch.tensor([0, 9, 117]), keep=keep)


# Short rows and long ones, several blocks of positions, channels in vectors of their own, one position.
SIZES = [(1, 1, 1, 1), (2, 1, 5, 3), (1, 3, 224, 224), (3, 2, 40, 130), (2, 50, 6, 7), (1, 512, 7, 7), (2, 600, 1, 2)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend, size, dtype, layout):
    b, c, h, w = size
    counts = torch.tensor([h * w // 3, 0, h * w])
    check(make(size, dtype, 1, layout), make((1, c, 1, 1), dtype, 2), ranks_of(b, h, w), counts)
    check(make(size, dtype, 1, layout), make(size, dtype, 2, layout), ranks_of(b, h, w, 1, torch.int32), counts)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_larger_than_caches(layout):
    # Odd images, so that each but the first begins somewhere in a line of the caches.
    counts = torch.arange(85) * 200
    check(
        make((1, 3, 129, 131), torch.float32, 1, layout),
        make((1, 3, 1, 1), torch.float32, 2),
        ranks_of(1, 129, 131),
        counts,
    )


def test_by_hand(backend):
    images = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
    ranks = torch.tensor([[[2, 0], [3, 1]]])
    deleted = ops.perturb_by_rank(images, torch.zeros(1, 1, 1, 1), ranks, torch.tensor([0, 1, 3, 4]))
    assert deleted[0, :, 0].tolist() == [[[1, 2], [3, 4]], [[1, 0], [3, 4]], [[0, 0], [3, 0]], [[0, 0], [0, 0]]]
    inserted = ops.perturb_by_rank(images, torch.full((1, 1, 1, 1), 9.0), ranks, torch.tensor([0, 1, 4]), keep=True)
    assert inserted[0, :, 0].tolist() == [[[9, 9], [9, 9]], [[9, 2], [9, 9]], [[1, 2], [3, 4]]]


def test_deletion_and_insertion_share_every_pixel(backend):
    """What one takes from the image, the other takes from the baseline."""
    images, baseline = make((2, 3, 8, 8), torch.float64, 1), make((2, 3, 8, 8), torch.float64, 2)
    ranks, counts = ranks_of(2, 8, 8), torch.arange(0, 65, 8)
    deleted, inserted = (ops.perturb_by_rank(images, baseline, ranks, counts, keep=keep) for keep in (False, True))
    assert torch.equal(deleted, ops.perturb_by_rank(baseline, images, ranks, counts, keep=True))
    assert torch.equal(deleted + inserted, (images + baseline)[:, None].expand_as(deleted))


@pytest.mark.parametrize("integers", INTEGERS, ids=str)
def test_ties_negative_ranks_and_counts_beyond_either_type(backend, integers):
    images, baseline = make((2, 2, 5, 20), torch.float32, 1), make((1, 2, 1, 1), torch.float32, 2)
    ranks = (ranks_of(2, 5, 20) // 7 - 5).to(integers)
    info = torch.iinfo(integers)
    ranks[0, 0, :2], ranks[1, 2, 3:5] = info.max, info.min
    extremes = [-(2**63), -(2**31) - 1, -(2**31), -(2**31) + 1, -1, 0, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**63 - 1]
    check(images, baseline, ranks, torch.tensor(extremes))
    check(images, baseline, ranks, torch.tensor(extremes), keep=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_is_copied(backend, dtype):
    """Signalling NaN, negative zero, subnormals: all 2^16 halves, random words of the wider types."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    words = torch.arange(-(2**15), 2**15).to(bits)
    if dtype.itemsize > 2:
        words = words * 0x9E3779B1 ^ (words << (8 * dtype.itemsize - 17))
    images = words.view(dtype).view(1, 2, 128, 256)
    ranks, counts = ranks_of(1, 128, 256), torch.tensor([0, 1000, 128 * 256])
    for result in (
        ops.perturb_by_rank(images, torch.zeros(1, 2, 1, 1, dtype=dtype), ranks, counts)[:, 0],
        ops.perturb_by_rank(images, torch.zeros(1, 2, 1, 1, dtype=dtype), ranks, counts, keep=True)[:, 2],
        ops.perturb_by_rank(torch.zeros_like(images), images, ranks, counts)[:, 2],
    ):
        assert torch.equal(result.view(bits), images.view(bits))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_result_is_a_batch_for_a_network(backend, layout):
    images = make((3, 3, 6, 8), torch.float32, 1, layout)
    result = ops.perturb_by_rank(images, images[:1] * 0, ranks_of(3, 6, 8), COUNTS)
    batch = result.flatten(0, 1)
    assert batch.data_ptr() == result.data_ptr()
    assert batch.is_contiguous(memory_format=torch.channels_last if layout != "contiguous" else torch.contiguous_format)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("steps", [0, 2])
def test_empty(backend, shape, steps):
    result = ops.perturb_by_rank(
        torch.ones(shape), torch.zeros(1, 3, 1, 1), torch.zeros(shape[0], 4, 5, dtype=torch.int64), COUNTS[:steps]
    )
    assert result.shape == (shape[0], steps, 3, 4, 5)
    assert result.eq(1).flatten(2).all(2)[:, :1].all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_every_thread_count_and_in_any_batch(backend, layout):
    images, baseline = make((3, 3, 70, 71), torch.float32, 1, layout), make((1, 3, 70, 71), torch.float32, 2)
    ranks, counts = ranks_of(3, 70, 71), torch.arange(0, 4971, 710)
    first = ops.perturb_by_rank(images, baseline, ranks, counts)
    assert torch.equal(first[1:2], ops.perturb_by_rank(images[1:2], baseline, ranks[1:2], counts))
    assert torch.equal(first[:, 3:5], ops.perturb_by_rank(images, baseline, ranks, counts[3:5]))
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, ops.perturb_by_rank(images, baseline, ranks, counts))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    """4 GiB of half values; the last elements lie beyond 2^31."""
    images = make((1, 1, 16, 64), torch.float16, 1)
    counts = torch.full((2**21 + 1,), 1024)
    counts[-1] = 512
    ranks = torch.arange(1024).view(1, 16, 64)
    last = ops.perturb_by_rank(images, torch.zeros(1, 1, 1, 1, dtype=torch.float16), ranks, counts)[0, -2:, 0]
    assert torch.equal(last[1, 8:], images[0, 0, 8:])
    assert last[0].count_nonzero() + last[1, :8].count_nonzero() == 0


X, R = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
ERRORS = [
    ({"images": [1]}, TypeError, "images must be a torch.Tensor, got list"),
    ({"images": X.int()}, TypeError, r"images must be .* got torch.int32; convert with .float\(\)"),
    ({"images": X[0]}, ValueError, r"images must be \(B,C,H,W\), got 3 dimensions: \(3, 4, 5\)"),
    ({"images": X[:, :0]}, ValueError, r"images need at least one .* got \(B,C,H,W\) = \(2, 0, 4, 5\)"),
    ({"baseline": 0.0}, TypeError, "baseline must be a torch.Tensor, got float"),
    ({"baseline": X.half()}, TypeError, "baseline must be torch.float32 like the images, got torch.float16"),
    ({"baseline": X[:, :1]}, ValueError, r"must be \(1 or 2, 3, 1 or 4, 1 or 5\), got \(2, 1, 4, 5\)"),
    ({"baseline": X[0]}, ValueError, r"must be \(1 or 2, 3, 1 or 4, 1 or 5\), got \(3, 4, 5\)"),
    ({"baseline": X[..., :2]}, ValueError, r"must be \(1 or 2, 3, 1 or 4, 1 or 5\), got \(2, 3, 4, 2\)"),
    ({"baseline": X.to("meta")}, ValueError, "baseline is on meta, images on cpu"),
    ({"ranks": X[:, 0]}, TypeError, r"ranks must be int32 or int64, got torch.float32; convert with .long\(\)"),
    ({"ranks": R.flatten(1)}, ValueError, r"ranks must be \(2, 4, 5\), got \(2, 20\)"),
    ({"ranks": R[:1]}, ValueError, r"ranks must be \(2, 4, 5\), got \(1, 4, 5\)"),
    ({"ranks": R.to("meta")}, ValueError, "ranks is on meta, images on cpu"),
    ({"counts": [0, 1]}, TypeError, "counts must be a torch.Tensor, got list"),
    ({"counts": COUNTS.int()}, TypeError, "counts must be int64, got torch.int32"),
    ({"counts": COUNTS[None]}, ValueError, r"counts must be \(S,\), got 2 dimensions: \(1, 6\)"),
    ({"keep": 1}, TypeError, "keep must be a bool, got 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="perturb_by_rank: .*" + message):
        ops.perturb_by_rank(**{"images": X, "baseline": X, "ranks": R, "counts": COUNTS, **change})


@pytest.mark.parametrize(
    "change",
    [{"baseline": X[:, :1]}, {"baseline": X[..., :2]}, {"baseline": X.double()}, {"ranks": R[:1]}, {"ranks": R[0]},
     {"ranks": R.short()}, {"counts": COUNTS.int()}, {"counts": COUNTS[None]}, {"images": X.long()}],
    ids=str,
)  # fmt: skip
def test_bare_op_reads_nothing_out_of_bounds(change):
    with pytest.raises((ValueError, TypeError)):
        OP(**{"images": X, "baseline": X, "ranks": R, "counts": COUNTS, **change})


def test_inputs_that_require_grad_are_refused(backend):
    given = {"images": X, "baseline": X, "ranks": R, "counts": COUNTS}
    for call in (ops.perturb_by_rank, OP):
        for name in ("images", "baseline"):
            with pytest.raises(RuntimeError, match="perturb_by_rank is not differentiable"):
                call(**{**given, name: X.clone().requires_grad_()})
            with torch.no_grad():
                call(**{**given, name: X.clone().requires_grad_()})


@pytest.mark.parametrize(("layout", "dtype"), OPCHECKED)
def test_opcheck(layout, dtype):
    images, baseline = make((2, 3, 4, 6), dtype, 1, layout), make((1, 3, 1, 1), dtype, 2)
    torch.library.opcheck(OP, (images, baseline, ranks_of(2, 4, 6), COUNTS))
    torch.library.opcheck(OP, (images, images, ranks_of(2, 4, 6, 1, torch.int32), COUNTS[:0]), {"keep": True})
    torch.library.opcheck(OP, (torch.empty(0, 3, 4, 6, dtype=dtype), baseline, ranks_of(0, 4, 6), COUNTS))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(ops.perturb_by_rank, fullgraph=True, backend="aot_eager", dynamic=True)
    for b, steps in ((2, 4), (3, 5)):
        tensors = make((b, 3, 4, 6), torch.float32, 1), make((1, 3, 1, 1), torch.float32, 2), ranks_of(b, 4, 6)
        assert torch.equal(compiled(*tensors, COUNTS[:steps]), ops.perturb_by_rank(*tensors, COUNTS[:steps]))


def test_ranks_of_a_map_delete_its_most_relevant_pixels(backend):
    """What insertion and deletion do with it: the order of a map, the mean deleted from above."""
    maps = make((2, 6, 7), torch.float64, 1)
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(42).expand(2, -1)).view(2, 6, 7)
    result = ops.perturb_by_rank(maps[:, None], maps.new_full((1, 1, 1, 1), -9.0), ranks, torch.tensor([10]))
    for b in range(2):
        kept = np.sort(maps[b].numpy().ravel())[:-10]
        assert np.array_equal(np.sort(result[b].numpy().ravel())[10:], kept)
