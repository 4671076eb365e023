"""The torchvision zoo: programs equal modules, and features and gradients equal what hooks and autograd give."""

from __future__ import annotations

import pytest
import torch

from fastcam._testing.models import torchvision_models
from fastcam.program.capture import capture
from fastcam.program.cut import cut
from fastcam.program.hooks import hook_session
from fastcam.program.layers import find_layer
from fastcam.program.session import Bound
from fastcam.program.targets import resolve_targets

#: name, expected automatic layer, whether the head behind it is closed form
ZOO = [
    ("resnet50", "layer4", True),
    ("vgg16", "features.29", False),
    ("vgg11_bn", "features.27", False),
    ("densenet121", "", True),
    ("googlenet", "inception5b", True),
    ("mobilenet_v2", "features", True),
    ("mobilenet_v3_small", "features", False),
    ("efficientnet_b0", "features", True),
    ("convnext_tiny", "features", False),
    ("regnet_y_400mf", "trunk_output", True),
    ("squeezenet1_1", "classifier.2", True),
]


@pytest.fixture(scope="module")
def model(request) -> torch.nn.Module:
    """One for all tests of a network, which is captured once."""
    return build(request.param)


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(torchvision_models(), name)(weights=None, **extra).eval()


def gradients_by_hook(model, layer, images, classes):
    passed = hook_session(model, layer, images, "").forward(images, "gradients")
    return passed.features, passed.output, passed.gradients(resolve_targets(classes, passed.output, len(images)))


@pytest.mark.parametrize(("model", "layer", "closed"), ZOO, ids=[row[0] for row in ZOO], indirect=["model"])
def test_automatic_layer(model, layer, closed):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    program = capture(model, images)
    index, found = find_layer(program, model, None, 2)
    if layer:
        assert found == layer
    made = cut(program, index, found)
    session = Bound(made, model, torch.float32).session()
    passed = session.forward(images, "gradients")
    with torch.no_grad():
        assert torch.equal(passed.output, model(images))
    classes = [3, 7]
    gradients = passed.gradients(resolve_targets(classes, passed.output, 2))
    assert (made.affine is not None) == closed
    if layer:
        features, _, expected = gradients_by_hook(model, layer, images, classes)
        assert torch.equal(passed.features, features)
    else:
        by_graph = session.forward(images, "gradients", closed_form=False)
        expected = by_graph.gradients(resolve_targets(classes, passed.output, 2))
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=float(1e-5 * scale))


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        ("resnet18", "layer3"),
        ("resnet18", "layer2.0.bn1"),
        ("resnet18", "layer3.1.relu"),
        ("vgg11_bn", "features.12"),
        ("densenet121", "features.denseblock3"),
        ("googlenet", "inception4a"),
        ("mobilenet_v3_small", "features.5.block.1"),
        ("efficientnet_b0", "features.4"),
        ("convnext_tiny", "features.5.1.block.0"),
    ],
    indirect=["model"],
)
def test_inner_layers(model, layer):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    program = capture(model, images)
    index, found = find_layer(program, model, layer, 2)
    passed = Bound(cut(program, index, found), model, torch.float32).session().forward(images, "gradients")
    classes = torch.tensor([[0, 5], [1, 1], [999, 3]])
    gradients = passed.gradients(resolve_targets(classes, passed.output, 3))
    for column in range(2):
        features, output, expected = gradients_by_hook(model, layer, images, classes[:, column])
        assert torch.equal(passed.features, features)
        torch.testing.assert_close(passed.output, output, rtol=1e-5, atol=1e-5)
        scale = expected.abs().max()
        torch.testing.assert_close(gradients[:, column], expected, rtol=1e-3, atol=float(1e-4 * scale))


def test_vision_transformer_asks_for_a_layer():
    model = build("vit_b_16")
    program = capture(model, torch.randn(1, 3, 224, 224))
    with pytest.raises(ValueError, match=r"lies in or before attention layers"):
        find_layer(program, model, None, 2)


def test_swin_ends_in_a_feature_map():
    swin = torchvision_models().SwinTransformer  # swin_t of fewer blocks
    model = swin([4, 4], 96, depths=[1, 1, 1, 2], num_heads=[3, 6, 12, 24], window_size=[7, 7]).eval()
    images = torch.randn(1, 3, 64, 64)
    program = capture(model, images)
    index, name = find_layer(program, model, None, 2)
    assert name == "permute"
    assert program.nodes[index].shape == (None, 768, 2, 2)
    for layer in ("norm", "features.7", "features.7.1.mlp"):  # blocks keep (B, H, W, C)
        with pytest.raises(TypeError, match=r"channels last, \(B, 2, 2, 768\).*t.permute\(0, 3, 1, 2\)"):
            find_layer(program, model, layer, 2)
        assert find_layer(program, model, layer, 2, reshaped=True)[1] == layer
