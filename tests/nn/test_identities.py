"""LFI-CAM's identities, by their numbers in the order of its formulas: what must hold whatever the backbone.

Beside `tests/nn/test_lfi_cam.py` (1, 2, 5, 7 gradcheck, 8, 10 a, 11) and `tests/metrics/test_stability.py` (12).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcam
from fastcam._testing.models import GivenFeatures
from fastcam.nn import LFICAM
from fastcam.nn.lfi_cam import grey_at

torch.set_num_threads(1)

K = 6


def on(features: torch.Tensor, **options) -> LFICAM:
    torch.manual_seed(0)
    return LFICAM(GivenFeatures(features), 4, channels=K, **options).double()


def features(seed: int = 1, negative: bool = False) -> torch.Tensor:
    found = torch.rand((3, K, 5, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return found - 0.6 if negative else found


IMAGES = torch.randn((3, 3, 20, 20), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_3_scale_and_shift_of_the_features():
    """F -> a F scales the attended features alone; F -> F + b leaves masks, importances and attention."""
    f = features()
    model, scaled, shifted = on(f), on(3.5 * f), on(f + 2)
    with torch.no_grad():
        for each in (model, scaled, shifted):
            each.fc.bias.zero_()
    plain, larger, moved = model(IMAGES), scaled(IMAGES), shifted(IMAGES)
    torch.testing.assert_close(larger.attention, plain.attention)
    torch.testing.assert_close(larger.importance, plain.importance)
    torch.testing.assert_close(larger.logits, 3.5 * plain.logits)
    torch.testing.assert_close(moved.attention, plain.attention)
    torch.testing.assert_close(moved.importance, plain.importance)
    grey = grey_at(IMAGES, f.shape[2:])
    for other in (3.5 * f, f + 2):
        torch.testing.assert_close(fastcam.ops.lfi_mask(other, grey), fastcam.ops.lfi_mask(f, grey))


def test_4_a_constant_added_to_all_importance_logits_changes_nothing():
    """The last batch norm's shift is added to every z, where the ReLU behind it lets all pass."""
    model = on(features()).eval()
    norm = model.fin.layers[-2]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.bias.fill_(50)
    plain = model(IMAGES)
    with torch.no_grad():
        norm.bias.add_(7)
    moved = model(IMAGES)
    assert (plain.importance.amax(1) > 1.001 * plain.importance.amin(1)).all()
    torch.testing.assert_close(moved.importance, plain.importance)
    torch.testing.assert_close(moved.attention, plain.attention)


def test_4_permuted_channels_permute_the_importances_alone():
    f = features(negative=True)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    model = on(f)
    with torch.no_grad():
        for module in model.fin.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    turned = copy.deepcopy(model)
    with torch.no_grad():
        turned.backbone.features.copy_(f[:, order])
        turned.fc.weight.copy_(model.fc.weight[:, order])
        for module in turned.fin.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight[order][:, order].clone())
            elif isinstance(module, nn.BatchNorm2d):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    value = getattr(module, name)
                    value.copy_(value[order].clone())
    plain, found = model(IMAGES), turned(IMAGES)
    torch.testing.assert_close(found.importance, plain.importance[:, order])
    torch.testing.assert_close(found.attention, plain.attention)
    torch.testing.assert_close(found.logits, plain.logits)


@pytest.mark.parametrize("channel", range(K))
def test_6_one_importance_far_above_the_others_shows_that_channel(channel):
    f = features(negative=True)
    model = on(f).eval()
    with torch.no_grad():
        model.fin.layers[-2].bias[channel] = 200
    found = model(IMAGES)
    assert found.importance[:, channel].tolist() == [1, 1, 1]
    p = f[:, channel : channel + 1].relu()
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    torch.testing.assert_close(found.attention, (p - low) / (high - low))


def test_7_the_importance_network_learns_through_the_attention_alone():
    model, labels = on(features()), torch.arange(3)
    functional.cross_entropy(model(IMAGES).logits, labels).backward()
    assert all(p.grad.abs().max() > 0 for p in model.fin.parameters() if p.ndim == 4)
    wanted = model(IMAGES)
    model.zero_grad()
    f = model.backbone(IMAGES)
    importance = model.fin(f, grey_at(IMAGES, f.shape[2:]))
    _, attention = fastcam.ops.lfi_attend(f, importance)
    logits = model.fc(((1 + attention.detach()) * f).mean((2, 3)))
    torch.testing.assert_close(logits, wanted.logits)
    functional.cross_entropy(logits, labels).backward()
    assert model.backbone.features.grad.abs().max() > 0
    assert all(p.grad is None for p in model.fin.parameters())


def test_9_three_ways_of_gradient_to_the_features():
    """As the classified features, in the attention's sum, and in the masks: none is nothing, and they add up."""
    model, labels = on(features()), torch.arange(3)
    functional.cross_entropy(model(IMAGES).logits, labels).backward()
    ways = [features().requires_grad_() for _ in range(3)]
    classified, summed, masked = ways
    importance = model.fin(masked, grey_at(IMAGES, masked.shape[2:]))
    p = torch.einsum("bk,bkhw->bhw", importance, summed).relu().unsqueeze(1)
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    logits = model.fc(((1 + (p - low) / (high - low)) * classified).mean((2, 3)))
    parts = torch.autograd.grad(functional.cross_entropy(logits, labels), ways)
    assert all(part.abs().max() > 1e-4 for part in parts)
    torch.testing.assert_close(model.backbone.features.grad, sum(parts))


def test_10_attention_never_turns_the_sign_of_a_feature():
    f = features(negative=True)
    importance = torch.rand((3, K), generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(1)
    f[0, :, 0, 0] = 0
    attended, attention = fastcam.ops.lfi_attend(f, importance)
    assert torch.equal(attended.sign(), f.sign())
    assert (attended.abs() >= f.abs()).all()
    assert (attended.abs() <= 2 * f.abs()).all()
    assert attention.amax() == 1


# ---- second derivatives ----


def test_a_gradient_penalty_is_refused_and_create_graph_alone_is_not():
    model = on(features())
    loss = functional.cross_entropy(model(IMAGES).logits, torch.arange(3))
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(loss, parameters, retain_graph=True)
    kept = torch.autograd.grad(loss, parameters, create_graph=True)
    for one, other in zip(kept, plain, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match=r"fastcam\.ops\.lfi_(mask|attend) can be differentiated once"):
        sum(grad.square().sum() for grad in kept).backward()


def test_a_gradient_penalty_is_refused_under_compile():
    model = on(features())
    compiled = torch.compile(model, backend="aot_eager")
    loss = functional.cross_entropy(compiled(IMAGES).logits, torch.arange(3))
    (grad,) = torch.autograd.grad(loss, model.backbone.features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|differentiated once"):
        grad.square().sum().backward()


def test_checkpointed_recomputation_still_trains():
    """Which lets saved tensors be read once only."""
    model, labels = on(features()).eval(), torch.arange(3)
    functional.cross_entropy(model(IMAGES).logits, labels).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = torch.utils.checkpoint.checkpoint(model, IMAGES, use_reentrant=False)
    loss = functional.cross_entropy(found.logits, labels)
    for one, other in zip(wanted, torch.autograd.grad(loss, list(model.parameters()), create_graph=True), strict=True):
        torch.testing.assert_close(other, one)


# ---- without the attention, on several machines ----


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_plain_classifier_under_ddp_wants_unused_parameters_found(one_process):
    def steps(model: nn.Module, **options) -> None:
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        for _ in range(2):
            model.zero_grad()
            functional.cross_entropy(wrapped(IMAGES).logits, torch.arange(3)).backward()

    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        steps(on(features(), attention=False))
    model, alone = on(features(), attention=False), on(features(), attention=False)
    steps(model, find_unused_parameters=True)
    functional.cross_entropy(alone(IMAGES).logits, torch.arange(3)).backward()
    torch.testing.assert_close(model.fc.weight.grad, alone.fc.weight.grad)
    torch.testing.assert_close(model.backbone.features.grad, alone.backbone.features.grad)
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in model.fin.parameters())
