"""`overlay` against its written formula in numpy's float64 (`fastcam/_testing/kernel_cases.py`), byte by byte."""

from __future__ import annotations

import pytest
import torch

from fastcam import ops
from fastcam._testing.kernel_cases import check_overlay, overlay_arguments
from fastcam._testing.ops import DTYPES, LAYOUTS, make

OP = torch.ops.fastcam.overlay.default
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def check(*arguments, **options) -> None:
    before = [x.clone() for x in arguments[:3]]
    check_overlay(ops.overlay(*arguments, **options), *arguments, **options)
    for tensor, kept in zip(arguments, before, strict=False):
        assert torch.equal(tensor.nan_to_num(), kept.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("signed", [False, True])
def test_layouts_and_dtypes(backend, signed, layout, dtype):
    images, maps, table = overlay_arguments((2, 3, 11, 14), dtype, targets=2, signed=signed)
    images, maps = LAYOUTS[layout](images), LAYOUTS[layout](maps)
    check(images, maps, table, 0.7, signed)
    check(images, maps[:, 1], table, 1.0, signed, **IMAGENET)
    check(images, maps.to(table.dtype), table, 0.3, signed)
    check(images[:, :1], maps, table, 0.8, signed)
    check(images[:, 1:2], maps[:, 0], table, 0.8, signed, **IMAGENET)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 1), (1, 15), (3, 17), (16, 16), (1, 257), (90, 91), (224, 224)], ids=str)
def test_sizes(backend, size, layout):
    for channels in (1, 3):
        images, maps, table = overlay_arguments((2, channels, *size), torch.float32)
        check(LAYOUTS[layout](images), maps, table, **IMAGENET)


@pytest.mark.parametrize("colours", [1, 2, 256, 65536])
def test_tables(backend, colours):
    images, maps, _ = overlay_arguments((1, 3, 40, 40), torch.float32)
    check(images, maps, 255 * torch.rand(colours, 3, generator=torch.Generator().manual_seed(0)))


def test_by_hand(backend):
    table = torch.tensor([[0.0, 0.0, 255.0], [255.0, 0.0, 0.0]])
    images = torch.tensor([0.0, 1.0, 0.5, 0.5]).view(1, 1, 1, 4)
    found = ops.overlay(images, torch.tensor([[[0.0, 1.0, 0.25, 0.64]]]), table, 1.0)
    # 127.5 is rounded to 128, the even one; 0.25 takes half of the first colour, 0.64 four fifths of the second.
    assert found.tolist() == [[[[0, 0, 0], [255, 0, 0], [64, 64, 192], [230, 26, 26]]]]
    signed = ops.overlay(images[..., :2], torch.tensor([[[-1.0, 0.0]]]), table, 1.0, True)
    assert signed.tolist() == [[[[0, 0, 255], [255, 255, 255]]]]


def test_no_evidence_shows_the_pixels_and_full_evidence_the_colour(backend):
    """Every eighth of a grey step but the halves, which 255 x is only by its rounding."""
    eighths = torch.arange(-16, 2064)
    levels = eighths[eighths % 8 != 4] / 8 / 255
    images = levels.view(1, 1, 1, -1)
    table = torch.tensor([[7.0, 8.0, 9.0]])
    for nothing in (torch.zeros(1, 1, len(levels)), torch.full((1, 1, len(levels)), torch.nan)):
        shown = ops.overlay(images, nothing, table, 1.0)
        assert torch.equal(shown[0, 0, :, 1], (levels.clamp(0, 1) * 255).round().to(torch.uint8))
    shown = ops.overlay(images, torch.ones(1, 1, len(levels)), table, 1.0)
    assert (shown == torch.tensor([7, 8, 9], dtype=torch.uint8)).all()


def test_maps_of_an_image_are_drawn_as_alone(backend):
    images, maps, table = overlay_arguments((3, 3, 9, 10), torch.float32, targets=4)
    together = ops.overlay(images, maps, table)
    for b in range(3):
        for t in range(4):
            assert torch.equal(together[b, t], ops.overlay(images[b : b + 1], maps[b : b + 1, t], table)[0])


def test_large_results_are_those_of_their_parts():
    """Results of 16 MiB and more are stored past the caches where maps are aligned, as every other one here is."""
    images, maps, table = overlay_arguments((1, 3, 201, 296), torch.float32, targets=95)
    found = ops.overlay(images, maps, table, **IMAGENET)
    assert found.nbytes >= 16 << 20
    parts = [ops.overlay(images, part, table, **IMAGENET) for part in maps.split(24, 1)]
    assert torch.equal(found, torch.cat(parts, 1))


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 5, 6)])
def test_empty(backend, shape):
    found = ops.overlay(torch.zeros(shape[0], 3, 5, 6), torch.zeros(shape), torch.zeros(4, 3))
    assert found.shape == (*shape, 3)
    assert found.dtype == torch.uint8


def test_same_bytes_on_every_thread_count(backend):
    images, maps, table = overlay_arguments((2, 3, 100, 130), torch.float32)
    first, threads = ops.overlay(images, maps, table), torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, ops.overlay(images, maps, table))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_more_elements_than_int32(backend):
    """Maps of one image that all are one map: 2.1 GB of bytes, the last ones beyond 2^31."""
    images, maps, table = overlay_arguments((1, 3, 64, 64), torch.float16)
    targets = 2**31 // (3 * 64 * 64) + 1
    found = ops.overlay(images, maps[:, None].expand(-1, targets, -1, -1), table)
    assert torch.equal(found[0, -1], ops.overlay(images, maps, table)[0])


X, M, T = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5), torch.zeros(8, 3)
ERRORS = [
    ({"images": [1]}, TypeError, "images must be a torch.Tensor, got list"),
    ({"images": X.byte()}, TypeError, r"images must be float64, .* got torch.uint8; convert with .float\(\)"),
    ({"images": X[0]}, ValueError, r"images must be .*\(B,1,H,W\), got 3 dimensions: \(3, 4, 5\)"),
    ({"images": X[:, :2]}, ValueError, r"images must be \(B,3,H,W\) or \(B,1,H,W\), got \(2, 2, 4, 5\)"),
    ({"maps": M[:1]}, ValueError, r"maps must be \(2, 4, 5\) or \(2, T, 4, 5\), got \(1, 4, 5\)"),
    ({"maps": M.mT}, ValueError, r"maps must be \(2, 4, 5\) or \(2, T, 4, 5\), got \(2, 5, 4\)"),
    ({"maps": M.double()}, TypeError, "maps must be torch.float32 like the images, got torch.float64"),
    ({"maps": M.to("meta")}, ValueError, "maps is on meta, images on cpu"),
    ({"table": T[:, :2]}, ValueError, r"table must be \(L,3\) with L in 1..65536, got \(8, 2\)"),
    ({"table": T[:0]}, ValueError, r"table must be \(L,3\) with L in 1..65536, got \(0, 3\)"),
    ({"table": T.double()}, TypeError, "table must be torch.float32, got torch.float64"),
    ({"table": T.to("meta")}, ValueError, "table is on meta, images on cpu"),
    ({"alpha": 1.5}, ValueError, r"alpha must lie in \[0,1\], got 1.5"),
    ({"alpha": "1"}, TypeError, "alpha must be a finite float, got str"),
    ({"signed": 1}, TypeError, "signed must be a bool, got 1"),
    ({"mean": (0.5,)}, ValueError, r"give both mean and std or neither, got mean=\(0.5,\), std=None"),
    ({"mean": (0.5, 0.5), "std": (1.0,)}, ValueError, r"mean must hold one number or three, got \(0.5, 0.5\)"),
    ({"mean": (0.5,), "std": 1.0}, ValueError, "std must hold one number or three, got 1.0"),
    ({"mean": (0.5,), "std": (float("inf"),)}, ValueError, "std must be a finite float, got inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_what_was_given(change, error, message):
    with pytest.raises(error, match="overlay: " + message):
        ops.overlay(**{"images": X, "maps": M, "table": T, **change})


@pytest.mark.parametrize(
    "change",
    [{"images": X[:, :2]}, {"maps": M[:1]}, {"maps": M.double()}, {"table": T[:, :2]}, {"table": T.double()},
     {"alpha": 2.0}, {"mean": [0.5]}, {"mean": [0.5, 0.5], "std": [1.0]}, {"images": X.long()}],
    ids=str,
)  # fmt: skip
def test_bare_op_reads_nothing_out_of_bounds(change):
    with pytest.raises((ValueError, TypeError)):
        OP(**{"images": X, "maps": M, "table": T, **change})


def test_inputs_that_require_grad_are_refused(backend):
    given = {"images": X, "maps": M, "table": T}
    for call in (ops.overlay, OP):
        for name, value in given.items():
            with pytest.raises(RuntimeError, match="overlay is not differentiable"):
                call(**{**given, name: value.clone().requires_grad_()})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    images, maps, table = make((2, 3, 4, 6), torch.float32, 1, layout), make((2, 5, 4, 6), torch.float32, 2), T
    torch.library.opcheck(OP, (images, maps, table))
    torch.library.opcheck(OP, (images, maps[:, 0], table, 0.5, True), {"mean": [0.5], "std": [0.1, 0.2, 0.3]})
    torch.library.opcheck(OP, (torch.empty(0, 1, 4, 6), torch.empty(0, 4, 6), table))


def test_compiled_graph_has_the_values_of_eager():
    compiled = torch.compile(ops.overlay, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3):
        tensors = overlay_arguments((b, 3, 4, 6), torch.float32)
        assert torch.equal(compiled(*tensors, **IMAGENET), ops.overlay(*tensors, **IMAGENET))
