"""Tokens, channels last, signals, volumes, callable targets and wrapped models: each on a real architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing.models import gap_linear, seeded, torchvision_models, vgg_like


def pictures(count: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


# --- tokens and channels last ---


def vit() -> nn.Module:
    def build() -> nn.Module:
        made = torchvision_models().VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
        nn.init.normal_(made.heads.head.weight)
        return made

    return seeded(build)


def swin() -> nn.Module:
    return seeded(lambda: torchvision_models().SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=5))


def convnext() -> nn.Module:
    def build() -> nn.Module:
        models = torchvision_models()
        block = models.convnext.CNBlockConfig
        made = models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=5)
        for module in made.modules():
            if isinstance(module, models.convnext.CNBlock):
                module.layer_scale.data.fill_(0.5)
        return made

    return seeded(build)


def _grid(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 1:].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)


def _first(block: torch.Tensor) -> torch.Tensor:
    return block.permute(0, 3, 1, 2)


ARRANGED = [
    (vit, "encoder.layers.encoder_layer_1.ln_1", _grid),
    (swin, "features.3", _first),
    (convnext, "features.3.0.block.3", _first),
]


@pytest.mark.parametrize("method", ["grad_cam", "lift_cam", "hires_cam", "score_cam"])
@pytest.mark.parametrize(("build", "layer", "by_hand"), ARRANGED, ids=["vit", "swin", "convnext"])
def test_tokens_and_channels_last_by_themselves(build, layer, by_hand, method):
    """The same as with the transform written out, against which other tests hold the oracle."""
    model, images = build(), pictures(2, 32, 32)
    result = fastcam.attribute(model, images, method, layer=layer, targets=[1, 3])
    expected = fastcam.attribute(model, images, method, layer=layer, targets=[1, 3], reshape_transform=by_hand)
    assert result.maps.amax((1, 2)).min() > 0
    assert torch.equal(result.maps, expected.maps)
    assert torch.equal(result.raw, expected.raw)


@pytest.mark.parametrize(("build", "layer", "by_hand"), ARRANGED, ids=["vit", "swin", "convnext"])
def test_pairs_of_tokens_and_channels_last(build, layer, by_hand):
    model, images = build(), pictures(2, 32, 32)
    for embedding in ("output", "gem"):
        found, expected = (
            fastcam.attribute_pair(model, images[:1], images[1:], layer=layer, embedding=embedding, **options)
            for options in ({}, {"reshape_transform": by_hand})
        )
        assert found.maps_a.amax() > 0
        for name in ("maps_a", "maps_b", "contributions", "score"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(("build", "layer", "by_hand"), ARRANGED, ids=["vit", "swin", "convnext"])
def test_through_a_hook(build, layer, by_hand):
    """A model that is not captured, here for a hook of its own: channels last by themselves, tokens when told how."""
    model, images = build(), pictures(2, 32, 32)
    options = {"layer": layer, "targets": [1, 3]}
    expected = fastcam.attribute(model, images, "grad_cam", **options)
    handle = model.register_forward_hook(lambda *_: None)
    try:
        told = {"reshape_transform": by_hand} if build is vit else {}
        result = fastcam.attribute(model, images, "grad_cam", **options, **told)
        torch.testing.assert_close(result.maps, expected.maps, rtol=0, atol=1e-5)
        if build is vit:
            with pytest.raises(TypeError, match=r"ln_1' gives tokens of shape \(B, 17, 16\).*reshape_transform"):
                fastcam.attribute(model, images, "grad_cam", **options)
        if build is convnext:  # its blocks end in a permutation: channels are second again
            block = fastcam.attribute(model, images, "grad_cam", layer="features.3", targets=[1, 3])
    finally:
        handle.remove()
    if build is convnext:
        whole = fastcam.attribute(model, images, "grad_cam", layer="features.3", targets=[1, 3])
        torch.testing.assert_close(block.maps, whole.maps, rtol=0, atol=1e-5)


class Patches(nn.Module):
    """Patches of 4 x 4, `before` learned tokens and `after` more, one linear step, the mean of all."""

    def __init__(self, before: int = 0, after: int = 0, hidden: bool = False):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.before, self.after = nn.Parameter(torch.randn(1, before, 8)), nn.Parameter(torch.randn(1, after, 8))
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.hidden = hidden

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).mT
        if self.hidden:  # no concatenation to tell where the class token stands
            x = functional.pad(x, (0, 0, 1, 0))
        else:
            rows = [self.before.expand(x.shape[0], -1, -1), x, self.after.expand(x.shape[0], -1, -1)]
            x = torch.cat([part for part in rows if part.shape[1]], 1)
        return self.head(functional.gelu(self.block(x)).mean(1))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (5, 0), (0, 2), (1, 3)])
def test_tokens_that_are_none_of_the_grid(before, after):
    model, images = seeded(lambda: Patches(before, after)), pictures(2, 12, 20)
    options = {"layer": "block", "targets": 2, "size": "layer"}
    result = fastcam.attribute(model, images, "hires_cam", **options)
    expected = fastcam.attribute(
        model,
        images,
        "hires_cam",
        reshape_transform=lambda t: t[:, before : before + 15].mT.reshape(len(t), 8, 3, 5),
        **options,
    )
    assert result.maps.shape == (2, 3, 5)
    assert torch.equal(result.maps, expected.maps)


def test_tokens_whose_place_is_unknown():
    model = seeded(lambda: Patches(hidden=True))
    with pytest.raises(TypeError, match=r"tokens of shape \(B, 16, 8\): a grid 3 x 5 and 1 more.*reshape_transform"):
        fastcam.attribute(model, pictures(2, 12, 20), "grad_cam", layer="block")


def test_tokens_that_fit_two_grids():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns = nn.Conv2d(3, 8, (4, 2), (4, 2)), nn.Conv2d(3, 8, (2, 4), (2, 4))
            self.block = nn.Linear(8, 5)

        def forward(self, images):
            x = self.rows(images).flatten(2) + self.columns(images).flatten(2)
            return self.block(x.mT).mean(1)

    with pytest.raises(TypeError, match=r"fit grids 2 x 4, 4 x 2.*reshape_transform"):
        fastcam.attribute(seeded(Two), pictures(2, 8, 8), "grad_cam", layer="block")


# --- signals and volumes ---


class Wide(nn.Module):
    """FCN for time series (Wang et al. 2017), small: kernels 7, 5 and 3 with batch norms, global average pool. In two
    dimensions it reads signals of height 1, in three volumes of depth and height 1, with the same weights."""

    def __init__(self, rank: int):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1]
        flat = (1,) * (rank - 1)

        def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
            pads = (*(0,) * (rank - 1), kernel // 2)
            return [conv(inputs, outputs, (*flat, kernel), padding=pads), norm(outputs), nn.ReLU()]

        self.features = nn.Sequential(*block(3, 6, 7), pool((*flat, 2), (*flat, 2)), *block(6, 8, 5), *block(8, 6, 3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(functional.silu(self.features(x).flatten(2).mean(2)))


EVERYWHERE = [
    name
    for name, row in fastcam.methods().items()
    if row["explains"] == "images" and name not in ("cam", "lfi_cam", "rsp")
]
#: Flat kernels have height 1 and would count as 1 x 1 in two dimensions alone.
OPTIONS = {"shap_cam": {"max_exact_maps": 6}, "attribution_equilibrium": {"pointwise": "all"}}


def twins() -> tuple[dict[int, nn.Module], dict[int, torch.Tensor]]:
    models = {rank: seeded(lambda rank=rank: Wide(rank)).double() for rank in (1, 2, 3)}
    with torch.no_grad():
        for rank in (1, 3):
            for own, other in zip(models[rank].state_dict().values(), models[2].state_dict().values(), strict=True):
                own.copy_(other.reshape(own.shape))
    x = pictures(2, 24, seed=4).double()
    return models, {1: x, 2: x.unsqueeze(2), 3: x.unsqueeze(2).unsqueeze(2)}


@pytest.mark.parametrize("method", EVERYWHERE)
def test_signals_and_volumes_are_flat_pictures(method):
    """A signal's map is that of a picture of height 1, and so is that of a volume of depth and height 1. Float64."""
    models, inputs = twins()
    found = {
        rank: fastcam.attribute(models[rank], inputs[rank], method, targets=[1, 3], **OPTIONS.get(method, {}))
        for rank in (1, 2, 3)
    }
    expected = found[2].maps.squeeze(1)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found[1].maps, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found[3].maps.squeeze(1).squeeze(1), expected, rtol=0, atol=1e-9)


def video() -> nn.Module:
    """torchvision's R(2+1)D without most of its blocks."""

    def build() -> nn.Module:
        from torchvision.models.video import resnet as video

        made = video.VideoResNet(video.BasicBlock, [video.Conv2Plus1D] * 4, [1, 1, 1, 1], video.R2Plus1dStem)
        made.layer3, made.layer4, made.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
        return made

    torchvision_models()
    return seeded(build)


def test_a_video_network():
    """Grad-CAM by hand in three dimensions, and relevance that adds up without biases."""
    model, clips = video().double(), pictures(1, 4, 16, 16).double()
    result = fastcam.attribute(model, clips, "grad_cam", layer="layer2", targets=2, size="layer", normalize=False)
    kept: list[torch.Tensor] = []
    handle = model.layer2.register_forward_hook(lambda *args: kept.append(args[2]))
    score = model(clips)[0, 2]
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    expected = (gradient.mean((2, 3, 4), keepdim=True) * kept[0]).sum(1).relu()
    torch.testing.assert_close(result.maps, expected.detach(), rtol=1e-9, atol=1e-12)
    relevance = fastcam.attribute(model, clips, "lrp", targets=2, normalize=False, composite="epsilon_plus")
    assert relevance.maps.shape == (1, 4, 16, 16)
    torch.testing.assert_close(relevance.maps.sum() - relevance.delta.sum(), torch.ones(()).double())


# --- segmentation and detection ---


def test_segmentation_by_a_callable():
    model = seeded(
        lambda: torchvision_models().segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=5
        )
    )
    images = pictures(1, 64, 64)

    def score(output: dict[str, torch.Tensor]) -> torch.Tensor:
        return output["out"][:, 3, 20:40, 20:40].mean((1, 2))

    result = fastcam.attribute(
        model, images, "grad_cam", layer="backbone.16", targets=score, normalize=False, relu=False
    )
    by_hand(model, model.backbone["16"], images, score, result.raw)
    assert result.scores["out"].shape == (1, 5, 64, 64)


def test_detection_by_a_callable():
    """The raw outputs of torchvision's SSDlite: the strongest anchor of a class."""

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            make = torchvision_models().detection.ssdlite320_mobilenet_v3_large
            made = make(weights=None, weights_backbone=None, num_classes=5)
            self.backbone, self.head = made.backbone, made.head

        def forward(self, images):
            return self.head(list(self.backbone(images).values()))

    model, images = seeded(Raw), pictures(1, 64, 64)

    def score(output: dict[str, torch.Tensor]) -> torch.Tensor:
        return output["cls_logits"][..., 2].amax(1)

    layer = "backbone.features.0"
    result = fastcam.attribute(model, images, "grad_cam", layer=layer, targets=score, normalize=False, relu=False)
    by_hand(model, model.get_submodule(layer), images, score, result.raw)


def by_hand(model: nn.Module, module: nn.Module, images: torch.Tensor, score: Callable, raw: torch.Tensor) -> None:
    """Grad-CAM through a hook and autograd."""
    kept: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda *args: kept.append(args[2]))
    total = score(model(images)).sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(total, kept[0])
    expected = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).detach()
    assert expected.abs().max() > 0
    torch.testing.assert_close(raw, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# --- wrapped models ---


def test_data_parallel():
    model, images = gap_linear(), pictures(3, 16, 16)
    expected = fastcam.attribute(model, images, "lift_cam")
    wrapped = fastcam.attribute(nn.DataParallel(model), images, "lift_cam", layer="features")
    assert torch.equal(wrapped.maps, expected.maps)


def test_distributed_data_parallel(tmp_path):
    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model, images = vgg_like(), pictures(3, 16, 16)
        expected = fastcam.attribute(model, images, "lrp")
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(fastcam.attribute(wrapped, images, "lrp").maps, expected.maps)
    finally:
        distributed.destroy_process_group()


# --- several inputs ---


class Fused(nn.Module):
    """Late fusion of SqueezeNet and what is known beside an image, which scales the features and adds to the scores."""

    def __init__(self):
        super().__init__()
        self.features = torchvision_models().squeezenet1_1(weights=None).features
        self.gate, self.head, self.aside = nn.Linear(4, 512), nn.Linear(512, 5), nn.Linear(4, 5)

    def forward(self, images: torch.Tensor, *, known: dict[str, torch.Tensor]) -> torch.Tensor:
        gate = self.gate(known["age"]).sigmoid()[..., None, None]
        return self.head((self.features(images) * gate).mean((2, 3))) + self.aside(known["age"])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_of_several_inputs(rows, caplog):
    model, images = seeded(Fused), pictures(3, 64, 64)
    known = {"age": torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))}
    bound = fastcam.bind(model, known=known)
    result = fastcam.attribute(bound, images, "grad_cam", targets=2, layer="model.features", normalize=False)
    everyone = {"age": known["age"].expand(3, 4)}
    assert torch.equal(result.scores, model(images, known=everyone).detach())
    gate = model.gate(everyone["age"]).sigmoid()
    weights = model.head.weight[2] * gate / 9
    expected = torch.einsum("bk,bkhw->bhw", weights, model.features(images)).relu().detach()
    torch.testing.assert_close(result.raw, expected, rtol=1e-5, atol=1e-6)
    assert ("hook" in caplog.text) == (rows == 3)
    if rows == 1:  # captured: relevance to the pixels too
        relevance = fastcam.attribute(bound, images, "lrp", targets=2)
        assert relevance.maps.abs().amax((1, 2)).min() > 0


# --- tiles ---


def test_tiles_of_a_network_without_borders_are_the_whole():
    """Every 1 x 1 convolution sees its pixel alone, so tiles change nothing but the pooling's size."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    )
    images = pictures(2, 20, 28)
    whole = fastcam.attribute(model, images, "hires_cam", targets=[1, 3], layer="1")
    tiled = fastcam.attribute_tiles(model, images, "hires_cam", tile=(8, 12), overlap=0.25, targets=[1, 3], layer="1")
    torch.testing.assert_close(tiled.maps, whole.maps, rtol=0, atol=1e-5)
    # Grad-CAM's weights are 1 / (pixels) of the classifier's, so that the unscaled maps differ by the tiles' share.
    torch.testing.assert_close(tiled.raw * 8 * 12, whole.raw * 20 * 28, rtol=1e-4, atol=1e-4)
    assert tiled.scores.shape == (3 * 3, 2, 5)


def test_tiles_average_where_they_overlap():
    model = seeded(lambda: torchvision_models().squeezenet1_1(weights=None, num_classes=5)).double()
    images = pictures(1, 64, 96).double()
    result = fastcam.attribute_tiles(model, images, "lrp", tile=(64, 64), overlap=0.5, targets=2)
    left, right = (fastcam.attribute(model, part, "lrp", targets=2, normalize=False).maps
                   for part in (images[..., :64], images[..., 32:]))  # fmt: skip
    middle = (left[..., 32:] + right[..., :32]) / 2
    expected = torch.cat([left[..., :32], middle, right[..., 32:]], -1)
    assert expected.abs().max() > 0
    torch.testing.assert_close(result.raw, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.maps, expected / expected.abs().max(), rtol=1e-6, atol=1e-6)


def test_tiles_refuse():
    model, images = gap_linear(), pictures(1, 8, 12)
    with pytest.raises(ValueError, match="say which class"):
        fastcam.attribute_tiles(model, images, tile=(8, 8), targets=None)
    with pytest.raises(ValueError, match=r"got \(9, 8\)"):
        fastcam.attribute_tiles(model, images, tile=(9, 8), targets=1)
    with pytest.raises(ValueError, match=r"overlap.*1\.0"):
        fastcam.attribute_tiles(model, images, tile=(8, 8), overlap=1.0, targets=1)
    images = pictures(2, 8, 12)
    images[1, 0, 0, 0] = torch.nan  # in the first of its two tiles
    result = fastcam.attribute_tiles(model, images, tile=(8, 8), targets=1, on_nonfinite="mask")
    assert result.valid.tolist() == [True, False]
    assert result.maps.flatten(1).amax(1).tolist() == [1, 0]
    assert not result.raw[1].any()
