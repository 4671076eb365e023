"""LFI-CAM against the formulas written out here with plain autograd, its identities, its backbones and bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing.models import GivenFeatures, torchvision_models
from fastcam.nn import LFICAM, FeatureImportanceNetwork, densenet_bc, features_of, resnet, resnext29

torch.set_num_threads(1)


class Plain(nn.Module):
    """The network's formulas in plain PyTorch, on the modules of an `LFICAM`."""

    def __init__(self, model: LFICAM):
        super().__init__()
        self.model = model

    def forward(self, images):
        model = self.model
        f = model.backbone(images)
        g = functional.interpolate(images.mean(1, keepdim=True), f.shape[2:], mode="bilinear", align_corners=False)
        low, high = f.amin((2, 3), keepdim=True), f.amax((2, 3), keepdim=True)
        varied = high > low
        n = torch.where(varied, (f - low) / torch.where(varied, high - low, 1), 1)
        n = torch.where(f == 0, 0, n)
        z = model.fin.layers(n if model.fin.input == "features" else n * g).mean((2, 3))
        s = torch.softmax(z, 1)
        p = (s[:, :, None, None] * f).sum(1, keepdim=True).relu()
        low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
        varied = high > low
        constant = p if model.constant_map == "raw" else torch.zeros_like(p)
        a = torch.where(varied, (p - low) / torch.where(varied, high - low, 1), constant)
        x = (1 + a) * f if model.attention else f
        return model.fc(model.tail(x).mean((2, 3))), a, s


def small(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> LFICAM:
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.ReLU()
    )
    return LFICAM(backbone, 4, **options).to(dtype)


def pictures(count: int = 5, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn((count, 3, 20, 24), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model: nn.Module, run: nn.Module, images: torch.Tensor):
    """Results, and every gradient of a loss that reads all of them."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    logits, attention, importance = run(images)
    truth = torch.arange(len(images)) % 4
    weight = torch.linspace(-1, 1, attention.numel()).reshape(attention.shape).to(attention)
    loss = functional.cross_entropy(logits, truth) + (weight * attention).sum() + (importance**2).sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return (logits, attention, importance), found | {"images": images.grad}


OPTIONS = [
    {},
    {"fin_relu": "all"},
    {"fin_kernel": 1, "fin_squeeze": 2},
    {"fin_squeeze": 3},
    {"fin_input": "features"},
    {"constant_map": "zeros"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_equals_plain_pytorch_with_all_gradients(options, dtype, tolerance):
    """In train mode, batch norms included."""
    model = small(dtype=dtype, **options)
    images = pictures(dtype=dtype)
    found, ours = gradients(model, model, images)
    expected, theirs = gradients(model, Plain(model), images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for name, gradient in theirs.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            ours[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("channels", [512, 2048])
def test_equals_plain_pytorch_with_many_channels(channels):
    """In float32; the map's range is a small part of its sums over the channels."""
    torch.manual_seed(2)
    backbone = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU())
    model = LFICAM(backbone, 4, fin_kernel=1, fin_squeeze=16)
    images = pictures(2, torch.float32)
    found, ours = gradients(model, model, images)
    expected, theirs = gradients(model, Plain(model), images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for name, gradient in theirs.items():
        limit = 1e-6 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def test_many_channels_are_no_further_from_float64_than_plain_pytorch():
    """Where the map's range is a small part of its sums over the channels, float32 has no 1e-6 to give: there the
    attention is nearer to that in float64 than the plain module's, which alone is 1.4e-6 off."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((4, 2048, 7, 7), generator=generator).relu()
    importance = (0.05 * torch.randn((4, 2048), generator=generator)).softmax(1)

    def plain(features, importance):
        p = (importance[:, :, None, None] * features).sum(1, keepdim=True)
        low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
        return (p - low) / (high - low)

    truth = plain(features.double(), importance.double())
    theirs = float((plain(features, importance) - truth).abs().max())
    for layout in (torch.contiguous_format, torch.channels_last):
        _, found = fastcam.ops.lfi_attend(features.contiguous(memory_format=layout), importance)
        assert float((found - truth).abs().max()) <= min(theirs, 1.5e-6)


def test_gradcheck():
    torch.manual_seed(0)
    model = LFICAM(nn.Conv2d(1, 3, 2), 2, image_size=(1, 4, 4)).double().eval()
    images = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = model.fc.weight
    kernel = model.backbone.weight

    def run(images, kernel, weight):
        state = {"backbone.weight": kernel, "fc.weight": weight}
        return tuple(torch.func.functional_call(model, state, (images,)))

    assert torch.autograd.gradcheck(run, (images, kernel, weight))


def test_transforms_of_torch_func():
    """Each image's own gradients, and the ops alone, which refuse."""
    model, images = small().eval(), pictures(3)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image.unsqueeze(0),)).logits[0, 1]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)
    for i, image in enumerate(images):
        model.zero_grad()
        loss(dict(model.named_parameters()), image).backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][i], weight.grad, rtol=1e-10, atol=1e-12)
    features = torch.rand((2, 3, 4, 4))
    for op, given in ((fastcam.ops.lfi_mask, features[:, :1]), (fastcam.ops.lfi_attend, features[:, :, 0, 0])):
        with pytest.raises(RuntimeError, match=r"does not run inside torch\.func"):
            torch.func.grad(lambda x, op=op, given=given: op(x, given)[0].sum())(features)


def test_ranges():
    logits, attention, importance = small()(pictures())
    assert logits.shape == (5, 4)
    assert attention.shape == (5, 1, 5, 6)
    assert attention.amin((1, 2, 3)).tolist() == [0] * 5
    assert attention.amax((1, 2, 3)).tolist() == [1] * 5
    assert (importance > 0).all()
    torch.testing.assert_close(importance.sum(1), torch.ones(5, dtype=torch.float64))


def on(features: torch.Tensor, **options) -> LFICAM:
    torch.manual_seed(0)
    return LFICAM(GivenFeatures(features.double()), 4, channels=features.shape[1], **options).double()


def test_attention_does_not_change_with_the_scale_of_the_features():
    f = torch.rand(3, 6, 5, 5, dtype=torch.float64) + 0.1
    images = pictures(3)
    one, other = on(f)(images), on(3.5 * f)(images)
    torch.testing.assert_close(one.attention, other.attention)
    torch.testing.assert_close(one.importance, other.importance)
    shifted = on(f + 2)(images)  # all positive before and after
    torch.testing.assert_close(one.attention, shifted.attention)


def test_a_network_that_tells_nothing_apart_averages():
    """The last norm's scale and shift zero: s = 1 / K, and A is the scaled mean of the features."""
    model = small()
    norm = [layer for layer in model.fin.layers if isinstance(layer, nn.BatchNorm2d)][-1]
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)
    _, attention, importance = model(pictures())
    torch.testing.assert_close(importance, torch.full_like(importance, 1 / 6))
    mean = model.backbone(pictures()).mean(1, keepdim=True)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    torch.testing.assert_close(attention, (mean - low) / (high - low))


def test_entropy_of_a_fresh_network_is_near_its_maximum():
    importance = small().eval()(pictures(8)).importance
    entropy = -(importance * importance.log()).sum(1)
    assert (entropy > 0.95 * math.log(6)).all()


def test_all_three_ways_carry_gradient():
    model = small()
    model(pictures()).logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.fin.parameters() if p.ndim == 4)
    off = small(attention=False)
    logits, attention, _ = off(pictures())
    torch.testing.assert_close(logits, off.fc(off.backbone(pictures()).mean((2, 3))))
    logits.sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in off.fin.parameters())
    assert attention.amax() == 1


def test_attention_feels_neither_scale_nor_shift_of_the_map():
    """dL/dP is orthogonal to P and to constants, for a loss that sees P through A alone."""
    f = torch.rand(2, 6, 5, 5, dtype=torch.float64)
    model = on(f)
    model.backbone.features.data = f
    s = torch.rand(2, 6, dtype=torch.float64).softmax(1)
    p = torch.einsum("bk,bkhw->bhw", s, f).unsqueeze(1).requires_grad_()
    _, attention = fastcam.ops.lfi_attend(p, torch.ones(2, 1, dtype=torch.float64))
    (attention * torch.rand_like(attention)).sum().backward()
    torch.testing.assert_close((p.grad * p).sum((1, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(p.grad.sum((1, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


ODD = {
    "a constant channel": lambda f: f.index_fill(1, torch.tensor([2]), 0.7),
    "a dead channel": lambda f: f.index_fill(1, torch.tensor([2]), 0.0),
    "a constant map": lambda f: torch.zeros_like(f).index_fill(1, torch.tensor([2]), 3.0),
    "no evidence": lambda f: -f,
    "all dead": lambda f: torch.zeros_like(f),
}


@pytest.mark.parametrize("constant_map", ["raw", "zeros"])
@pytest.mark.parametrize("case", list(ODD))
def test_odd_features_have_finite_values_and_gradients(case, constant_map):
    f = ODD[case](torch.rand(3, 6, 5, 5, dtype=torch.float64) + 0.1)
    model = on(f, constant_map=constant_map)
    found, ours = gradients(model, model, pictures(3)[:, :, :5, :5])
    expected, theirs = gradients(model, Plain(model), pictures(3)[:, :, :5, :5])
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)
    for name, gradient in theirs.items():
        assert ours[name].isfinite().all()
        torch.testing.assert_close(ours[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_a_grey_image_of_zeros():
    model = small()
    found, ours = gradients(model, model, torch.zeros(3, 3, 20, 24, dtype=torch.float64))
    assert all(part.isfinite().all() for part in (*found, *ours.values()))


def test_images_of_one_channel_and_odd_sizes():
    model = LFICAM(nn.Conv2d(1, 5, 3), 3, image_size=(1, 9, 9)).eval()
    assert model(torch.randn(2, 1, 11, 7)).attention.shape == (2, 1, 9, 5)


def test_channels_last_bf16_autocast_and_compile():
    model = small(dtype=torch.float32).eval()
    images = pictures(dtype=torch.float32)
    plain = model(images)
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(tuple(last), tuple(plain), rtol=1e-4, atol=1e-5)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, attention, importance = model(images)
    assert (attention.dtype, importance.dtype) == (torch.float32, torch.float32)
    functional.cross_entropy(logits.float(), torch.zeros(5, dtype=torch.long)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_compiled_training_step_equals_eager():
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, ours = gradients(model, model, pictures())
    again, theirs = gradients(model, compiled, pictures())
    torch.testing.assert_close(tuple(found), tuple(again))
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient)


DDP = """
import sys, torch
from torch import nn
sys.path.insert(0, {root!r})
import torch.distributed as dist
from fastcam.nn import LFICAM
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model = LFICAM(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), 4).double().eval()
wrapped = nn.parallel.DistributedDataParallel(model)
images = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
own = slice(2 * rank, 2 * rank + 2)
loss = nn.functional.cross_entropy(wrapped(images[own]).logits, torch.arange(4)[own])
loss.backward()
torch.save([p.grad for p in model.parameters()], sys.argv[3])
"""


def test_two_processes_average_their_gradients(tmp_path):
    root = os.getcwd()
    code = DDP.format(root=root)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(rank), str(tmp_path / "meet"), str(tmp_path / f"{rank}.pt")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    torch.manual_seed(0)
    model = LFICAM(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), 4).double().eval()
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    functional.cross_entropy(model(images).logits, torch.arange(4)).backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad)


# ---- reading it, and other methods on it ----


def test_the_method_reads_the_attention():
    model, images = small().eval(), pictures()
    result = fastcam.attribute(model, images, "lfi_cam", targets=2, size="layer")
    torch.testing.assert_close(result.maps, model(images).attention.squeeze(1).detach())
    torch.testing.assert_close(result.weights, model(images).importance.detach())
    torch.testing.assert_close(result.scores.logits, model(images).logits.detach())
    assert result.layer == "backbone"
    assert result.targets.tolist() == [2] * 5
    several = fastcam.attribute(model, images, "lfi_cam", targets="top3")
    assert several.maps.shape == (5, 3, 20, 24)
    assert torch.equal(several.maps[:, 0], several.maps[:, 2])
    default = fastcam.attribute(model, images, "lfi_cam")
    assert torch.equal(default.targets, model(images).logits.argmax(1))


def test_other_methods_explain_its_logits():
    model, images = small().eval(), pictures()
    found = fastcam.attribute(model, images, "grad_cam", targets=1, layer="backbone", size="layer", normalize=False)
    features = model.backbone(images).detach().requires_grad_()
    logits = Plain(model_at(model, features))(images)[0]
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    torch.testing.assert_close(found.maps, expected.detach())
    assert fastcam.attribute(model, images, "score_cam", layer="backbone").maps.isfinite().all()
    lift = fastcam.attribute(model, images, "lift_cam", targets=1)
    attended = (1 + model(images).attention) * model.backbone(images)
    torch.testing.assert_close(lift.weights, (model.fc.weight[1] * attended.mean((2, 3))).detach())


def model_at(model: LFICAM, features: torch.Tensor) -> LFICAM:
    """The same head behind fixed features."""

    class Fixed(nn.Module):
        def forward(self, images):
            return features

    import copy

    backbone, model.backbone = model.backbone, Fixed()
    fixed = copy.copy(model)
    fixed._modules = dict(model._modules)
    model.backbone = backbone
    return fixed


def test_the_method_wants_such_a_network():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(TypeError, match=r"fastcam.nn.LFICAM; this model returns Tensor"):
        fastcam.attribute(plain, torch.randn(2, 3, 9, 9), "lfi_cam")


def test_a_straight_line_is_refused_for_a_reason_that_holds():
    """PyTorch fixes the number of images where the grey image is resized; the attention itself has its graph."""
    model, images = small().eval(), pictures()
    for run in (
        lambda: fastcam.Explainer(model, "lfi_cam", differentiable=True)(images),
        lambda: fastcam.export_program(model, "lfi_cam", images),
    ):
        with pytest.raises(
            fastcam.ExportError, match=r"as the resize in fastcam\.nn\.LFICAM .*model\(images\)\.attention"
        ):
            run()


@pytest.mark.parametrize("method", ["lfi_cam", "grad_cam", "lift_cam"])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_other_precisions(method, precision):
    model, images = small(dtype=torch.float32).eval(), pictures(dtype=torch.float32)
    plain = fastcam.attribute(model, images, method, targets=1, relu=False)
    other = fastcam.Explainer(model, method, precision=precision, relu=False)(images, 1)
    likeness = functional.cosine_similarity(plain.maps.flatten(1), other.maps.flatten(1).float())
    assert likeness.min() > (0.95 if precision == "bf16" else 0.9999)


# ---- backbones ----


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "maps", "fin", "total"),
    [
        (lambda: (resnet(20), None), 64, 0.148e6, 0.42e6),
        (lambda: (resnet(110), None), 256, 2.36e6, 4.07e6),
        (densenet_bc, 342, 4.21e6, 4.98e6),
        (lambda: (resnext29(), None), 1024, 37.8e6, 72.2e6),
    ],
    ids=["resnet20", "resnet110", "densenet", "resnext29"],
)
def test_backbones_have_the_sizes_of_the_experiments(make, maps, fin, total):
    with torch.device("meta"):
        backbone, tail = make()
        model = LFICAM(backbone, 10, channels=maps, tail=tail)
        features = backbone(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, maps, 8, 8)
    assert parameters(model.fin) == 36 * maps**2 + 8 * maps == pytest.approx(fin, rel=5e-3)
    assert parameters(model) == pytest.approx(total, rel=1.2e-2)


def test_a_dense_network_attends_before_its_last_norm():
    torch.manual_seed(0)
    features, tail = densenet_bc(10, growth=4)
    model = LFICAM(features, 10, tail=tail, image_size=(3, 32, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, attention, _ = model(images)
    f = features(images)
    assert (f < 0).any()
    torch.testing.assert_close(logits, model.fc(tail((1 + attention) * f).mean((2, 3))))


def torchvision_resnet(name="resnet18"):
    return getattr(torchvision_models(), name)(weights=None)


@pytest.mark.parametrize("stem", ["stride1", "keep"])
def test_torchvision_networks_give_14_by_14(stem):
    with torch.device("meta"):
        whole = torchvision_resnet()
        backbone = fastcam.nn.without_classifier(whole, stem=stem)
        model = LFICAM(backbone, 10, channels=512)
        assert backbone(torch.zeros(1, 3, 224, 224)).shape == (1, 512, 14, 14)
    assert parameters(model) == pytest.approx(20.6e6, rel=5e-3)


def test_features_of_a_named_layer_train():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3)))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.Linear(7, 3))
    images = torch.randn(4, 3, 12, 12)
    features = features_of(model, "body.2")
    torch.testing.assert_close(features(images), model.body[:3](images))
    assert not any(name.startswith("fc") for name, _ in features.named_parameters())
    last = features_of(model, images=images[:1])
    torch.testing.assert_close(last(images), model.body(images))
    whole = LFICAM(last, 3)
    whole(images).logits.sum().backward()
    assert model.body[0].weight.grad is not None
    before = model.body[1].running_mean.clone()
    whole(images)
    assert not torch.equal(before, model.body[1].running_mean)
    with pytest.raises(ValueError, match="has no layer 'bodi'"):
        features_of(model, "bodi")
    with pytest.raises(ValueError, match="pass images="):
        features_of(model)


class Noisy(nn.Module):
    def forward(self, x):
        return functional.dropout(x, 0.5, self.training)


def test_what_differs_in_training_stays_so():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 5, 3), Noisy(), nn.Dropout(0.5), nn.Conv2d(5, 7, 3))
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(2, 3, 12, 12)
    for training in (True, False):
        features = features_of(model.train(training), "0.3")
        assert features.training == training
        features.eval()
        assert torch.equal(features(images), features(images))
        features.train()
        assert not torch.equal(features(images), features(images))

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x):
            return self.conv(functional.dropout(x, 0.5, self.training)).mean((2, 3))

    with pytest.raises(ValueError, match="differs between training and evaluation"):
        features_of(Root(), "conv")


def test_initialisation_of_the_importance_network():
    torch.manual_seed(0)
    fin = FeatureImportanceNetwork(64)
    for layer in fin.layers:
        if isinstance(layer, nn.Conv2d):
            assert float(layer.weight.std()) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert float(FeatureImportanceNetwork(64, init="default").layers[0].weight.std()) < 0.03
    assert sum(isinstance(layer, nn.ReLU) for layer in LFICAM(resnet(8), 2, image_size=(3, 128, 128)).fin.layers) == 4


# ---- bad input ----


ERRORS = [
    ({"kernel": 5}, "kernel must be 1 or 3; got 5"),
    ({"relu": "some"}, "relu must be 'pairs' or 'all'"),
    ({"input": "image"}, "input must be 'masked' or 'features'"),
    ({"squeeze": 9}, "8 channels // squeeze=9 leaves none"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=lambda e: str(e)[:20])
def test_options_of_the_importance_network(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureImportanceNetwork(8, **options)


def test_bad_networks_and_images():
    with pytest.raises(ValueError, match="constant_map must be"):
        small(constant_map="ones")
    with pytest.raises(ValueError, match="num_classes"):
        LFICAM(nn.Conv2d(3, 4, 3), 0)
    with pytest.raises(ValueError, match=r"must give features \(B, K, h, w\); it gave \(2, 4\)"):
        LFICAM(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2, channels=4)(
            pictures(2).float()
        )
    with pytest.raises(ValueError, match="single position"):
        LFICAM(nn.Conv2d(3, 4, 3), 2, channels=4)(torch.randn(2, 3, 3, 3))
    with pytest.raises(ValueError, match=r"made for channels=5, features \(B, 5, h, w\); got \(2, 4, 6, 6\)"):
        LFICAM(nn.Conv2d(3, 4, 3), 2, channels=5)(torch.randn(2, 3, 8, 8))
    with pytest.raises(
        TypeError, match=r"features, tail = densenet_bc\(\); LFICAM\(features, num_classes, tail=tail\)"
    ):
        LFICAM(densenet_bc(10, growth=4), 10)
    for option in ({"channels": "64"}, {"channels": 4.0}, {"num_classes": "2"}, {"fin_squeeze": True}):
        with pytest.raises(TypeError, match=r"must be an integer; got ('64'|4\.0|'2'|True)"):
            LFICAM(nn.Conv2d(3, 4, 3), **{"num_classes": 2} | option)
    for size, message in ((64, "must be"), ((3, 2, 2), r"does not run on .* image_size=\(3, 2, 2\), .* or channels=")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            LFICAM(nn.Conv2d(3, 4, 3), 2, image_size=size)
    with pytest.raises(ValueError, match=r"tail must give \(B, 4, h, w\), .*; it gave \(2, 9, 6, 6\)"):
        LFICAM(nn.Conv2d(3, 4, 3), 2, tail=nn.Conv2d(4, 9, 1))(torch.randn(2, 3, 8, 8))
    with pytest.raises(TypeError, match="depth must be an integer; got '20'"):
        resnet("20")
    bad = pictures(3)
    bad[1, 0, 0, 0] = math.nan
    model = small()
    with pytest.raises(ValueError, match="features of image 1 are not finite"):
        model.eval()(bad)
    assert model.train()(bad).logits.isnan().any()  # in training the loss shows it
