"""Insertion, deletion and most-relevant-first against loops that perturb one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastcam import metrics

from .conftest import draw, network


def loop(model, image, attribution, target, base, counts, keep):
    """Probabilities with the n highest places kept or replaced, n in counts; equal values in row order."""
    order = np.argsort(-attribution.numpy().ravel(), kind="stable")
    found = []
    for n in counts:
        chosen = np.zeros(order.size, dtype=bool)
        chosen[order[:n]] = True
        use_image = torch.from_numpy(chosen if keep else ~chosen).reshape(attribution.shape)
        with torch.no_grad():
            found.append(model(torch.where(use_image, image, base)[None]).softmax(1)[0, target].item())
    return found


@pytest.mark.parametrize("steps", [1, 4, 5, 42, 100])  # 42 pixels
@pytest.mark.parametrize("chunk", [2, 7])
def test_equals_a_loop(model, images, maps, targets, steps, chunk):
    base = draw(3, 3, 6, 7, seed=5)
    step = math.ceil(42 / steps)
    counts = [*range(0, 42, step), 42]
    curves = metrics.insertion_deletion(model, images, maps, targets, steps=steps, baseline=base, chunk=chunk)
    for curve, keep, auc in zip(curves, (True, False), (metrics.insertion_auc, metrics.deletion_auc), strict=True):
        want = [loop(model, *case, counts, keep) for case in zip(images, maps, targets, base, strict=True)]
        np.testing.assert_allclose(curve.scores.numpy(), want, rtol=1e-10)
        np.testing.assert_allclose(curve.fractions.numpy(), np.array(counts) / 42)
        np.testing.assert_allclose(curve.auc.numpy(), np.trapezoid(want, np.array(counts) / 42, axis=1), rtol=1e-10)
        one = auc(model, images, maps, targets, steps=steps, baseline=base, chunk=chunk)
        torch.testing.assert_close(one, curve.auc)


def test_by_hand():
    class Mean(nn.Module):
        def forward(self, images):
            return images.flatten(1).mean(1, keepdim=True)

    images = torch.tensor([[[[8.0, 4.0], [0.0, 4.0]]]])
    maps = torch.tensor([[[0.9, 0.1], [0.5, 0.3]]])
    insertion, deletion = metrics.insertion_deletion(Mean().eval(), images, maps, 0, steps=4, output="logit")
    assert insertion.scores.tolist() == [[0, 2, 2, 3, 4]]
    assert deletion.scores.tolist() == [[4, 2, 2, 1, 0]]
    assert insertion.auc.item() == pytest.approx((0 / 2 + 2 + 2 + 3 + 4 / 2) / 4)
    # A perfect order of a linear score is its Lorenz curve; the worst is the same upside down.
    best = metrics.insertion_auc(Mean().eval(), images, images[:, 0], 0, steps=4, output="logit")
    worst = metrics.insertion_auc(Mean().eval(), images, -images[:, 0], 0, steps=4, output="logit")
    assert best.item() + worst.item() == pytest.approx(4)
    assert best.item() == pytest.approx((0 / 2 + 2 + 3 + 4 + 4 / 2) / 4)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    model, shape = network(rank), (12,) if rank == 1 else (2, 3, 2)
    images, maps, targets = draw(2, 3, *shape), draw(2, *shape, seed=1), torch.tensor([1, 3])
    _, deletion = metrics.insertion_deletion(model, images, maps, targets, steps=4)
    blank = torch.zeros(3, *shape, dtype=torch.float64)
    want = [loop(model, *case, blank, [0, 3, 6, 9, 12], False) for case in zip(images, maps, targets, strict=True)]
    np.testing.assert_allclose(deletion.scores.numpy(), want, rtol=1e-10)
    drop = metrics.average_drop(model, images, maps.clamp(0, 1), targets)
    assert drop.shape == (2,)
    with pytest.raises(ValueError, match=r"ROAD imputes images \(B, C, H, W\)"):
        metrics.road(model, images, maps, targets)


def test_named_baselines_are_the_references(model, images, maps, targets):
    blank = -torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64).reshape(1, 3, 1, 1) / 0.25
    settings = {"steps": 3, "mean": (0.5, 0.4, 0.3), "std": (0.25,) * 3}
    named = metrics.deletion_auc(model, images, maps, targets, baseline="black", **settings)
    given = metrics.deletion_auc(model, images, maps, targets, baseline=blank.expand(1, 3, 6, 7), **settings)
    torch.testing.assert_close(named, given)
    default = metrics.deletion_auc(model, images, maps, targets, steps=3)
    zeros = metrics.deletion_auc(model, images, maps, targets, steps=3, baseline=torch.zeros_like(images))
    torch.testing.assert_close(default, zeros)
    with pytest.raises(ValueError, match="there is no reference 'grey'"):
        metrics.deletion_auc(model, images, maps, targets, baseline="grey")
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        metrics.insertion_deletion(model, images, maps, targets, steps=0)


def test_an_image_does_not_depend_on_its_neighbours(model, images, maps, targets):
    for function in (metrics.insertion_auc, metrics.road):
        whole = (
            function(model, images, maps, targets, baseline="blur")
            if function is metrics.insertion_auc
            else (function(model, images, maps, targets))
        )
        for i in range(3):
            settings = {"baseline": "blur"} if function is metrics.insertion_auc else {}
            one = function(model, images[i : i + 1], maps[i : i + 1], targets[i : i + 1], **settings)
            torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-10, atol=1e-10)


def test_a_callable_sees_whole_batches(model, images, maps):
    own = torch.tensor([2, 0, 4])

    def score(output):
        return output.softmax(1).gather(1, own.unsqueeze(1)).squeeze(1)

    found = metrics.insertion_auc(model, images, maps, score, output="logit", chunk=2, steps=5)
    torch.testing.assert_close(found, metrics.insertion_auc(model, images, maps, own, steps=5))
    with pytest.raises(TypeError, match="needs class indices"):
        metrics.most_relevant_first(model, images, maps, score, output="logit")


def test_most_relevant_first_counts_what_the_model_recognises(model, images, maps, targets):
    canvas = draw(1, 3, 6, 7, seed=7)
    fractions = (0.05, 0.35, 0.5, 1)
    found = metrics.most_relevant_first(model, images, maps, targets, fractions=fractions, baseline=canvas)
    both = metrics.most_relevant_first(
        model, images, maps, targets, fractions=fractions, baseline=canvas, output="sigmoid"
    )
    for i in range(3):
        order = np.argsort(-maps[i].numpy().ravel(), kind="stable")
        for j, n in enumerate((2, 14, 21, 42)):  # floor(0.05 * 42) = 2
            chosen = torch.zeros(42, dtype=torch.bool)
            chosen[order[:n]] = True
            logits = model(torch.where(chosen.reshape(6, 7), images[i], canvas[0])[None])[0].detach()
            assert found.scores[i, j] == float(logits.argmax() == targets[i])
            assert both.scores[i, j] == float(logits[targets[i]] > 0)
    assert 0 < found.scores.mean() < 1
    assert found.fractions.tolist() == list(fractions)


def test_the_released_counts_and_canvas():
    class Count(nn.Module):
        def forward(self, images):
            return torch.stack([(images == 1).double().sum((1, 2, 3)), images.new_full((len(images),), 5017.5)], 1)

    images = torch.ones(1, 1, 224, 224)
    curve = metrics.most_relevant_first(
        Count().eval(), images, draw(1, 224, 224), 0, fractions=(0.05, 0.1, 0.15), baseline=torch.zeros(1, 1, 224, 224)
    )
    assert curve.scores.tolist() == [[0, 0, 1]]  # 2508, 5017, 7526 pixels of the image
    canvas = metrics.radial_canvas(torch.zeros(1, 3, 5, 5), mean=(0, 0, 0), std=(1, 1, 1))
    assert canvas[0, :, 2, 2].tolist() == pytest.approx([224 / 255] * 3)
    assert canvas[0, :, 0, 4].tolist() == pytest.approx([15 / 255] * 3)
    assert canvas[0, 0, 2, 4].item() == pytest.approx((224 - 209 / math.sqrt(2)) / 255)
    with pytest.raises(ValueError, match="ascend within"):
        metrics.most_relevant_first(Count().eval(), images, draw(1, 224, 224), 0, fractions=(0.5, 0.1))


def test_half_precision_and_channels_last(model, images, maps, targets):
    whole = metrics.insertion_auc(model, images, maps, targets)
    turned = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(metrics.insertion_auc(model, turned, maps, targets), whole)
    half = metrics.insertion_auc(model.bfloat16(), images.bfloat16(), maps, targets)
    torch.testing.assert_close(half, whole, rtol=0, atol=0.02)
    assert half.dtype == torch.float64


def test_a_network_with_hooks_runs_itself(model, images, maps, targets):
    folded, _ = metrics.insertion_deletion(model, images, maps, targets, steps=7)
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    hooked, _ = metrics.insertion_deletion(model, images, maps, targets, steps=7)
    np.testing.assert_allclose(hooked.scores.numpy(), folded.scores.numpy(), rtol=1e-10)
    assert sum(passes) >= len(images) * 2 * 6  # on every perturbed image
