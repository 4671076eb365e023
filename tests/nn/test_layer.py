"""`LFICAM(layer=)`: a whole classifier is cut at a layer; equals the network built by hand from the part before it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing.models import torchvision_models
from fastcam.nn import LFICAM, features_of
from fastcam.program.capture import capture

torch.set_num_threads(1)


class Classifier(nn.Module):
    """A residual network in the manner of torchvision's, small, with drop-out in its body and at its end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.25)
        self.layer1 = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.last = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def body(self, images):
        x = self.drop(self.stem(images))
        return self.layer2(functional.relu(x + self.layer1(x), inplace=True))

    def forward(self, images):
        return self.fc(self.last(self.body(images).mean((2, 3))))


class Checked(Classifier):
    """Code that torch.fx cannot trace, and no drop-out on the way."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Identity()

    def forward(self, images):
        assert images.shape[1] == 3
        images = functional.pad(images, (0, 1)) if images.shape[3] % 2 else images
        return super().forward(images)


class Body(nn.Module):
    """The part before the pooling, by hand."""

    def __init__(self, whole: Classifier):
        super().__init__()
        self.whole = whole

    def forward(self, images):
        return self.whole.body(images)


def network(kind=Classifier, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = kind().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    return model


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randn((count, 3, 16, 20), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


SIZE = (3, 16, 20)


def built(backbone: nn.Module, **options) -> LFICAM:
    torch.manual_seed(3)
    return LFICAM(backbone, 4, image_size=SIZE, **options).double()


def step(model: LFICAM, seed: int = 5):
    """Results in train mode, gradients by the parameter's tensor, and running statistics after it."""
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    found = model(pictures())
    (functional.cross_entropy(found.logits, torch.arange(4)) + found.attention.square().mean()).backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CASES = [(Classifier, "layer2"), (Classifier, None), (Checked, "layer2"), (Checked, None)]


@pytest.mark.parametrize(("kind", "layer"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_equals_the_backbone_cut_by_hand(kind, layer):
    """Logits, attention, all gradients and batch norm statistics of a training step, and evaluation after it."""
    model = network(kind)
    twin = copy.deepcopy(model)
    ours, theirs = built(model, layer=layer), built(Body(twin), channels=8)
    theirs.fin.load_state_dict(ours.fin.state_dict())
    theirs.fc.load_state_dict(ours.fc.state_dict())
    found, gradients = step(ours)
    wanted, others = step(theirs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    shared = {name.replace("backbone.whole.", "backbone."): gradient for name, gradient in others.items()}
    assert sorted(gradients) == sorted(shared)
    assert any(name.startswith("backbone.stem.0") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, shared[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), value)
    assert model.stem[1].num_batches_tracked == 1
    torch.testing.assert_close(tuple(ours.eval()(pictures())), tuple(theirs.eval()(pictures())))


@pytest.mark.parametrize("kind", [Classifier, Checked], ids=["traced", "captured"])
def test_survives_pickling(kind):
    ours = built(network(kind), layer="layer2").eval()
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(pictures()).logits, ours(pictures()).logits)
    assert list(again.state_dict()) == list(ours.state_dict())


def test_shares_the_model_and_leaves_its_classifier_out():
    model = network()
    ours = built(model, layer=model.layer2)
    own = {id(p) for p in model.parameters()}
    inside = [name for name, p in ours.named_parameters() if id(p) in own]
    assert sorted(name.removeprefix("backbone.") for name in inside) == sorted(
        name for name, _ in model.named_parameters() if not name.startswith("fc")
    )
    assert model(pictures()).shape == (4, 5)  # itself as before
    inner = built(model, layer="stem")
    assert inner.fc.in_features == 6
    torch.testing.assert_close(inner.eval().backbone(pictures()), model.eval().stem(pictures()))


def test_a_captured_backbone_has_one_size_and_no_drop_out():
    ours = built(network(Checked), layer="layer2").eval()
    assert fastcam.attribute(ours, pictures(), "lfi_cam").maps.shape == (4, 16, 20)
    with pytest.raises(ValueError, match=r"captured for images \(B, 3, 16, 20\); got \(2, 3, 16, 16\)"):
        ours(pictures(2)[..., :16])
    with pytest.raises(RuntimeError, match=r"torch.fx cannot trace Checked: .*pass images=torch.zeros"):
        features_of(network(Checked), "layer2")
    dropping = network(Checked)
    dropping.drop = nn.Dropout(0.25)
    with pytest.raises(ValueError, match="Dropout 'drop' does something else in training"):
        built(dropping, layer="layer2")
    dropping.drop = nn.Dropout(0)
    built(dropping, layer="layer2")


class Functional(nn.Module):
    """Its last feature map is made by code between modules, and something else runs before it in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.dropped = nn.Dropout2d(0.5)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, images):
        x = functional.relu(self.norm(self.dropped(self.conv(images))))
        return {"scores": self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))}


def test_a_last_map_made_between_modules():
    model = network(Functional).eval()
    part = features_of(model, images=pictures(1))
    torch.testing.assert_close(part(pictures()), model.norm(model.conv(pictures())).relu())
    part.train()
    assert not torch.equal(part(pictures()), part(pictures()))  # drop-out is in it
    assert built(model).fc.in_features == 6


def test_a_traced_part_is_explained_by_its_name(caplog):
    """torch.export names no operation by the torch.fx part that runs it; the part ends in code between modules."""
    ours = built(network(Functional)).eval()
    found = fastcam.attribute(ours, pictures(), "lfi_cam", size="layer")
    torch.testing.assert_close(found.maps, ours(pictures()).attention.squeeze(1).detach())
    assert found.layer == "backbone"
    assert not [record for record in caplog.records if record.name == "fastcam"]
    program = capture(ours, pictures())
    (value,) = program.layers["backbone"][-1]
    assert "relu" in str(program.nodes[value].target)
    assert program.layers["backbone.norm"][-1] != (value,)


class Deciding(nn.Conv2d):
    def forward(self, images):
        return super().forward(images if images.sum() < 1e9 else -images)


def test_a_network_that_cannot_be_captured_is_explained_at_its_backbone():
    ours = LFICAM(Deciding(3, 6, 3), 4, channels=6).double().eval()
    assert fastcam.attribute(ours, pictures(), "lfi_cam").layer == "backbone"


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_torchvision_classifiers(name):
    torch.manual_seed(0)
    model = getattr(torchvision_models(), name)(weights=None).eval()
    images = torch.randn(2, 3, 64, 64)
    ours = LFICAM(model, 3, fin_kernel=1, fin_squeeze=8).eval()
    if name == "resnet18":
        taken = []
        with torch.no_grad():
            handle = model.layer4.register_forward_hook(lambda m, i, o: taken.append(o))
            model(images)
            handle.remove()
        wanted = taken[0]
    else:
        wanted = model.features(images).relu()
    torch.testing.assert_close(ours.backbone(images), wanted)
    assert ours.fin.layers[0].in_channels == wanted.shape[1]
    ours.train()(images).logits.sum().backward()
    first = next(model.parameters())
    assert first.grad.abs().max() > 0


def test_what_cannot_be_cut_says_what_to_do():
    model = network()
    with pytest.raises(ValueError, match=r"Classifier has no layer 'layer3'; close names: .*'layer2'"):
        built(model, layer="layer3")
    with pytest.raises(ValueError, match=r"it gave \(1, 5\)\. Pass layer="):
        built(model, layer="fc")
    with pytest.raises(ValueError, match=r"gave \(4, 5\)\. Pass layer=.* or leave channels= out"):
        built(model, channels=8)(pictures())
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 20, 4)).double()
    with pytest.raises(ValueError, match="no spatial feature map"):
        built(flat)
    program = capture(model, pictures())
    with pytest.raises(TypeError, match=r"got Program\. Of a captured or exported network, pass the module"):
        built(program)

    class Branching(Classifier):
        def forward(self, images):
            return super().forward(images if images.sum() > 0 else -images)

    with pytest.raises(RuntimeError, match=r"torch.fx cannot trace Branching: .*, nor can it be captured: .*by hand"):
        built(network(Branching), layer="layer2")
    with pytest.raises(RuntimeError, match=r"last feature map of Branching cannot be found: .*pass layer="):
        built(network(Branching))
