"""Dtypes, layouts, image sizes and numbers of spatial dimensions, against the written formulas in float64.

The gate: at most twice as wrong as plain PyTorch (hooks and autograd in the same dtype, formulas in float32), both
measured against the same weights and images in float64, plus a few roundings of that dtype.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastcam
from fastcam._testing import models

METHODS = ["cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "layer_cam", "eigen_cam", "eigen_grad_cam"]
GENERAL = METHODS[1:]
#: Roundings of the network's dtype that the maps, whose range is 1, may be off beyond the gate.
ROUNDINGS = 4
NETS = {"gap": models.gap_linear, "vgg": models.vgg_like}


def images(size=(11, 14), batch=3, seed=0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def range_of(raw: torch.Tensor) -> float:
    return float(raw.abs().max())


@pytest.fixture(scope="module")
def cast():
    """(name, dtype) -> network, built once."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            made[name, dtype] = NETS[name]().to(dtype)
        return made[name, dtype]

    return get


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_error_gate(cast, oracle, name, dtype):
    net, x, classes = cast(name, dtype), images(dtype=dtype), [2, 0, 4]
    score = oracle.logit(classes)
    for method in METHODS if name == "gap" else GENERAL:
        got = fastcam.attribute(net, x, method, targets=classes, layer="features")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert got.maps.dtype == got.raw.dtype == wide
        assert got.scores.dtype == dtype
        maps, raw = oracle.explain(net, "features", x, method, score)
        eager_maps, eager_raw = oracle.explain(net, "features", x, method, score, dtype=dtype)
        # In float64 the eager side is the oracle itself, without error.
        unit = (64 if dtype == torch.float64 else ROUNDINGS) * torch.finfo(dtype).eps
        # Eigenvectors from a Gram matrix: errors of the order of eps / gap; the gate's factor covers eps itself.
        slack = unit if "eigen" not in method else 10 * unit
        for have, eager, want in ((got.maps, eager_maps, maps), (got.raw, eager_raw, raw)):
            allowed = 2 * float((eager.double() - want).abs().max()) + slack * range_of(want)
            assert float((have.double() - want).abs().max()) <= allowed, method


@pytest.mark.parametrize("precision", ["fp64", "fp32", "fp16", "bf16"])
def test_precision_option_is_a_converted_network(cast, precision):
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    net, x = cast("vgg", torch.float32), images(dtype=torch.float32)
    got = fastcam.Explainer(net, "grad_cam", layer="features", precision=precision)(x, 1)
    want = fastcam.attribute(cast("vgg", dtype), x.to(dtype), "grad_cam", layer="features", targets=1)
    assert got.scores.dtype == dtype
    torch.testing.assert_close(got.maps.double(), want.maps.double(), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (33, 10), (1, 40)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_any_image_size(cast, oracle, name, size):
    net, x = cast(name, torch.float64), images(size)
    for method in ("grad_cam", "layer_cam", "eigen_cam"):
        got = fastcam.attribute(net, x, method, targets=1, layer="features")
        maps, raw = oracle.explain(net, "features", x, method, oracle.logit([1] * 3))
        assert got.maps.shape == (3, *size)
        torch.testing.assert_close(got.raw, raw, rtol=0, atol=1e-12 * range_of(raw))
        torch.testing.assert_close(got.maps, maps, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", ["layer", (3, 2), (40, 41), "input"], ids=str)
def test_any_map_size(cast, oracle, size):
    net, x = cast("vgg", torch.float64), images()
    wanted = {"layer": (6, 7), "input": (11, 14)}.get(size, size)
    got = fastcam.attribute(net, x, "grad_cam", targets=1, layer="features", size=size)
    maps, raw = oracle.explain(net, "features", x, "grad_cam", oracle.logit([1] * 3), wanted)
    torch.testing.assert_close(got.maps, maps, rtol=0, atol=1e-12)
    plain = fastcam.attribute(net, x, "grad_cam", targets=1, layer="features", size=size, normalize=False)
    torch.testing.assert_close(plain.maps, oracle.resized(raw, wanted), rtol=0, atol=1e-13 * range_of(raw))


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers, laid out differently."""
    padded = torch.full((*x.shape[:2], x.shape[2] + 2, x.shape[3] + 3), torch.nan, dtype=x.dtype)
    padded[:, :, 1:-1, 2:-1] = x
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": padded[:, :, 1:-1, 2:-1],
        "transposed": x.mT.contiguous().mT,
        "every_other": x.repeat_interleave(2, 0)[::2],
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "every_other"])
def test_layout_of_images_does_not_matter(cast, dtype, layout):
    net, x = cast("vgg", dtype), images(dtype=dtype)
    other = layouts(x)[layout]
    assert torch.equal(other, x)
    assert not other.is_contiguous()
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]  # convolutions add differently
    for method in GENERAL:
        one = fastcam.attribute(net, x, method, targets=1, layer="features")
        two = fastcam.attribute(net, other, method, targets=1, layer="features")
        torch.testing.assert_close(two.maps, one.maps, rtol=0, atol=tolerance)


def test_channels_last_option_and_model(cast, oracle):
    x = images()
    for method in GENERAL:
        want = oracle.explain(cast("vgg", torch.float64), "features", x, method, oracle.logit([1] * 3))[0]
        option = fastcam.Explainer(cast("vgg", torch.float64), method, layer="features", channels_last=True)(x, 1)
        torch.testing.assert_close(option.maps, want, rtol=0, atol=1e-11)
    last = models.vgg_like().double().to(memory_format=torch.channels_last)
    got = fastcam.attribute(
        last, x.contiguous(memory_format=torch.channels_last), "grad_cam", targets=1, layer="features"
    )
    want = oracle.explain(cast("vgg", torch.float64), "features", x, "grad_cam", oracle.logit([1] * 3))[0]
    torch.testing.assert_close(got.maps, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cam_reads_weights_at_full_precision_on_large_layers(dtype):
    """W[c] / Z leaves the normal range of float16 for large Z; W[c] does not."""
    net = models.by_hand([[0.02, -0.013], [0.017, 0.031]]).to(dtype)
    x = torch.rand(1, 2, 96, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = fastcam.attribute(net, x, "cam", targets=0, layer="features")
    want = net.head[2].weight[:1].detach().double()
    torch.testing.assert_close(got.weights.double(), want, rtol=torch.finfo(dtype).eps, atol=0)


# --- one and three spatial dimensions ---


def as_planar(net: nn.Module, rank: int) -> nn.Module:
    """The two-dimensional twin of a 1-D network, or the three-dimensional twin of a 2-D one: kernels of size 1 on the
    new axis, which comes last for 1-D and first for 2-D."""
    twin = copy.deepcopy(net)
    for mine in twin.features:
        conv = mine.conv
        mine.conv = (nn.Conv2d if rank == 1 else nn.Conv3d)(
            conv.in_channels,
            conv.out_channels,
            (3, 1) if rank == 1 else (1, 3, 3),
            (*conv.stride, 1) if rank == 1 else (1, *conv.stride),
            (*conv.padding, 0) if rank == 1 else (0, *conv.padding),
        )
        mine.conv.weight, mine.conv.bias = nn.Parameter(conv.weight.unsqueeze(-1 if rank == 1 else 2)), conv.bias
    bins = torch.broadcast_to(torch.as_tensor(net.head[0].output_size), (rank,)).tolist()
    twin.head[0] = nn.AdaptiveAvgPool2d((*bins, 1)) if rank == 1 else nn.AdaptiveAvgPool3d((1, *bins))
    return twin.eval()


@pytest.mark.parametrize(("name", "method"), [("gap", "cam"), *((n, m) for n in NETS for m in GENERAL)])
@pytest.mark.parametrize("rank", [1, 2])
def test_dummy_axis_changes_nothing(rank, name, method):
    size = (13,) if rank == 1 else (9, 11)
    axis = -1 if rank == 1 else 2
    net, x = NETS[name](rank=rank).double(), images(size)
    twin = as_planar(net, rank)
    for targets in ([1, 0, 4], torch.tensor([[1, 2], [0, 3], [4, 4]])):
        one = fastcam.attribute(net, x, method, targets=targets, layer="features")
        two = fastcam.attribute(twin, x.unsqueeze(axis), method, targets=targets, layer="features")
        assert one.maps.shape[-rank:] == size
        axis_of_map = -1 if rank == 1 else -3
        torch.testing.assert_close(two.raw.squeeze(axis_of_map), one.raw, rtol=0, atol=1e-12 * range_of(one.raw))
        torch.testing.assert_close(two.maps.squeeze(axis_of_map), one.maps, rtol=0, atol=1e-11)
        assert float(one.maps.max()) == 1


@pytest.mark.parametrize("method", GENERAL)
@pytest.mark.parametrize("rank", [1, 3])
def test_written_formula_in_one_and_three_dimensions(oracle, rank, method):
    net = models.vgg_like(rank=rank).double()
    size, wanted = ((13,), (20,)) if rank == 1 else ((6, 9, 7), (5, 12, 7))
    x = images(size)
    got = fastcam.attribute(net, x, method, targets=[1, 0, 4], layer="features", size=wanted)
    maps, raw = oracle.explain(net, "features", x, method, oracle.logit([1, 0, 4]), wanted)
    torch.testing.assert_close(got.raw, raw, rtol=0, atol=1e-12 * range_of(raw))
    torch.testing.assert_close(got.maps, maps, rtol=0, atol=1e-11)


def test_one_dimensional_multipliers_are_not_targets(oracle):
    """A layer with as many positions as channels, where (B, K, L) multipliers have the shape of (B, T, K) weights."""
    net, x = models.vgg_like(rank=1).double(), images((16,))
    got = fastcam.attribute(net, x, "hires_cam", targets=1, layer="features")
    maps, raw = oracle.explain(net, "features", x, "hires_cam", oracle.logit([1] * 3))
    assert got.raw.shape == raw.shape == (3, 8)  # and the layer has 8 channels
    torch.testing.assert_close(got.maps, maps, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["attribution_equilibrium", "rsp"])
def test_relevance_of_pixels_in_bfloat16(method):
    """Networks of that dtype and `precision="bf16"` alike: the float32 maps, but for rounding."""
    net, x = models.vgg_like(), images((16, 16), dtype=torch.float32)
    options = {"targets": torch.tensor([[0, 1]] * len(x))} if method == "rsp" else {"targets": [2, 0, 4]}
    wanted = fastcam.Explainer(net.float(), method)(x, **options).maps
    half = copy.deepcopy(net).bfloat16()
    for found in (
        fastcam.Explainer(half, method)(x.bfloat16(), **options).maps,
        fastcam.Explainer(net, method, precision="bf16")(x, **options).maps,
    ):
        assert nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) >= 0.99
