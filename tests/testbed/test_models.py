"""The shipped models: architecture, weights that reach what their metadata states, and a script that still trains."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("safetensors")

from fastcam.nn.data import digits
from fastcam.testbed import MODELS, build, load, make_scenes, metadata, normalize, pointing_accuracy
from fastcam.testbed.models import MEAN, STD, WEIGHTS
from fastcam.testbed.scenes import GENERATOR_VERSION
from fastcam.testbed.train import (
    BRIEF,
    BRIEF_MEAN_AP,
    TEST_SEED,
    Recipe,
    _add_norms,
    _close_ups,
    _fold_norms,
    accuracy,
    main,
    predict,
    retrieval,
    train,
)


@pytest.fixture(scope="module")
def held_out():
    return make_scenes(1000, split="test", seed=TEST_SEED, region="strokes")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_weights_reach_the_stated_accuracy(name, held_out):
    facts = metadata(name)
    reached = accuracy(predict(load(name), held_out.images), held_out.labels)
    # Oracle: the metadata, measured on 4000 scenes; 1000 of them may differ by three standard errors of a fraction.
    for measure in ("top2", "exact"):
        stated = float(facts[measure])
        slack = 3 * (stated * (1 - stated) / 1000) ** 0.5
        assert getattr(reached, measure) == pytest.approx(stated, abs=slack), measure
    assert reached.mean_ap == pytest.approx(float(facts["mean_ap"]), abs=0.01)
    assert float(facts["top2"]) >= 0.9
    assert int(facts["generator"]) == GENERATOR_VERSION
    assert facts["model"] == name


def test_training_fits_a_few_scenes(one_thread, monkeypatch):
    """Both passes together: the same 32 scenes in every step are known by heart at the end."""
    few = make_scenes(32, split="train", region="strokes")
    monkeypatch.setattr(sys.modules[train.__module__], "make_scenes", lambda *_, **__: few)
    reached = accuracy(predict(train(Recipe("tiny_resnet", close_ups=1280, scenes=1280)), few.images), few.labels)
    assert reached.mean_ap >= 0.9  # by chance 0.2


@pytest.mark.slow
def test_a_brief_training_reaches_its_stated_accuracy(held_out, one_thread):
    reached = accuracy(predict(train(BRIEF), held_out.images), held_out.labels)
    assert reached.mean_ap >= BRIEF_MEAN_AP  # an untrained model has 0.2, the share of scenes that hold a digit


@pytest.mark.parametrize("name", MODELS)
def test_loaded_models_are_small_and_in_eval_mode(name):
    model = load(name)
    assert not any(module.training for module in model.modules())
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 2_000_000
    assert 100_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 400_000


def test_last_feature_maps_and_heads():
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for name, layer in (("tiny_resnet", "layer3"), ("tiny_vgg", "features")):
        model = load(name)
        handle = model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, name=name: sizes.update({name: tuple(output.shape)})
        )
        assert model(normalize(images)).shape == (2, 10)
        handle.remove()
    assert sizes == {"tiny_resnet": (2, 80, 12, 12), "tiny_vgg": (2, 12, 12, 12)}


def test_normalize_by_hand():
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    for channel in range(3):
        expected = (images[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(normalize(images)[:, channel], expected, rtol=0, atol=1e-12)


def test_unknown_model_gets_the_closest_name():
    with pytest.raises(ValueError, match="unknown testbed model 'tiny_resnt': did you mean 'tiny_resnet'"):
        load("tiny_resnt")


def test_accuracy_by_hand_and_by_scikit_learn():
    from sklearn.metrics import average_precision_score

    labels = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    logits = torch.full((4, 10), -1.0)
    logits.scatter_(1, labels, 1.0)
    assert accuracy(logits, labels).top2 == accuracy(logits, labels).exact == 1
    logits[1, 9] = 0.5  # a third digit above 0: the top two stay right, the set is not
    logits[2, 4] = -2.0  # a digit below all others: both are wrong
    reached = accuracy(logits, labels)
    assert (reached.top2, reached.exact) == (0.75, 0.5)

    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randperm(10, generator=generator)[:2] for _ in range(200)])
    logits = torch.randn(200, 10, generator=generator)
    truth = torch.zeros(200, 10).scatter_(1, labels, 1.0)
    expected = average_precision_score(truth.numpy(), logits.numpy(), average="macro")
    assert accuracy(logits, labels).mean_ap == pytest.approx(expected, abs=1e-9)


def test_folding_batch_norm_changes_nothing():
    torch.manual_seed(0)
    features = _add_norms(build("tiny_vgg").features)
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    features.double().eval()
    folded = _fold_norms(features)
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded)
    torch.testing.assert_close(folded(images), features(images), rtol=1e-10, atol=1e-10)


def test_close_ups_hold_their_digit():
    scenes = make_scenes(20, split="train", region="strokes")
    views, truth = _close_ups(scenes)
    assert views.shape == (40, 3, 48, 48)
    assert torch.equal(truth.argmax(1), scenes.labels.flatten())
    # Oracle: cutting the digit's mask out with the same view keeps every pixel of it.
    for slot in range(2):
        mask = scenes.masks[:, slot : slot + 1].expand(-1, 3, -1, -1).float()
        twin = type(scenes)(mask, scenes.labels, scenes.masks, scenes.boxes)
        seen = _close_ups(twin)[0].view(20, 2, 3, 48, 48)[:, slot]
        assert torch.equal(seen.sum((1, 2, 3)), mask.sum((1, 2, 3)))


def test_the_script_writes_weights_that_load(tmp_path, capsys, one_thread):
    path = tmp_path / "deep" / "weights.safetensors"
    arguments = [
        "--model",
        "tiny_vgg",
        "--out",
        str(path),
        "--close-ups",
        "64",
        "--scenes",
        "64",
        "--test-scenes",
        "20",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    facts = metadata("tiny_vgg", path)
    assert (facts["model"], facts["scenes"], facts["test_scenes"]) == ("tiny_vgg", "64", "20")
    state = load("tiny_vgg", path).state_dict()
    expected = train(Recipe("tiny_vgg", close_ups=64, scenes=64)).state_dict()
    assert set(state) == set(expected) == set(load("tiny_vgg").state_dict())
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key  # one thread, one machine: the same seed gives the same bits


def test_the_embedding_network_retrieves_as_stated():
    facts = metadata("tiny_embed")
    scenes = make_scenes(600, split="test", seed=TEST_SEED, region="strokes")
    model = load("tiny_embed")
    embeddings = predict(model, scenes.images)
    assert embeddings.shape == (600, 80)
    reached = retrieval(embeddings, scenes.labels)
    assert reached.recall1 == pytest.approx(float(facts["recall1"]), abs=0.01)
    assert reached.mean_ap == pytest.approx(float(facts["mean_ap"]), abs=0.02)
    assert reached.chance == pytest.approx(17 / 45, abs=0.03)  # two of ten digits, and two again: 1 - 28 / 45
    untrained = retrieval(predict(build("tiny_embed").eval(), scenes.images[:200]), scenes.labels[:200])
    assert untrained.mean_ap < 0.5
    assert (WEIGHTS / "tiny_embed.safetensors").stat().st_size <= 2_000_000


def test_retrieval_by_hand():
    embeddings = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [-1, 0]])
    labels = torch.tensor([[0, 1], [1, 2], [3, 4], [3, 0]])
    found = retrieval(embeddings, labels)
    assert found.recall1 == 0.75  # 0 and 1 find one another, 3 finds 2, with which it has a 3; 2 finds 1
    assert found.chance == pytest.approx(6 / 12)  # 0-1, 0-3, 2-3


def test_the_self_explaining_network_reaches_what_it_states():
    facts = metadata("tiny_lfi")
    held, masks = digits(1000, split="test")
    model = load("tiny_lfi")
    with torch.inference_mode():
        logits, attention, _ = model(normalize(held.images))
    stated = float(facts["accuracy, lfi_cam"])
    reached = float((logits.argmax(1) == held.labels).double().mean())
    assert reached == pytest.approx(stated, abs=3 * (stated * (1 - stated) / 1000) ** 0.5)
    maps = torch.nn.functional.interpolate(attention, (32, 32), mode="bilinear")[:, 0]
    stated = float(facts["pointing, lfi_cam"])
    assert pointing_accuracy(maps, masks) == pytest.approx(stated, abs=3 * (stated * (1 - stated) / 1000) ** 0.5)
    assert (WEIGHTS / "tiny_lfi.safetensors").stat().st_size <= 2_000_000
