"""Capture: a program computes exactly what the module computes, for any batch size, and sees every change of it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastcam.program.capture import CaptureError, Program, capture
from fastcam.program.cut import cut
from fastcam.program.execute import Schedule, Weights
from fastcam.program.layers import find_layer
from fastcam.program.session import Bound
from fastcam.program.targets import resolve_targets


def run(program: Program, model: nn.Module, images: torch.Tensor, in_place: bool = True, **weights):
    keep = program.output_indices
    values = Weights(program, model, **weights).values()
    values[program.input] = images
    with torch.no_grad():
        Schedule(program, program.ancestors(keep), keep, in_place).run(values)
    return program.result(values)


class Residual(nn.Module):
    """In-place and functional ReLU, a module used twice, a residual add, batch norm, dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        skip = x
        x = self.twice(x)
        x = functional.relu(x, inplace=True)
        x = self.twice(x)
        x += skip
        x = self.relu(x)
        return self.fc(self.drop(x.mean((2, 3))))


def trained_statistics(model: nn.Module) -> nn.Module:
    """Batch-norm statistics away from their defaults, so that a mix-up shows."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return trained_statistics(Residual())


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("in_place", [True, False])
def test_program_equals_module_bitwise(model, batch, in_place):
    images = torch.randn(batch, 3, 9, 7)
    kept = images.clone()
    program = capture(model, images)
    assert torch.equal(run(program, model, images, in_place), model(images))
    assert torch.equal(images, kept)


def test_module_used_twice_has_two_calls(model):
    program = capture(model, torch.randn(2, 3, 9, 7))
    assert len(program.layers["twice"]) == 2
    assert len(program.layers["relu"]) == 2
    first, second = (program.nodes[call[0]] for call in program.layers["twice"])
    assert first.kind == second.kind == "conv"
    assert first.index < second.index


def test_no_node_writes_in_place(model):
    program = capture(model, torch.randn(2, 3, 9, 7))
    for node in program.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
    # conv, bn, relu, conv, relu, conv, add, relu, mean, linear: the dropout is gone, the writes are functional
    assert [n.kind for n in program.nodes if n.kind not in ("parameter", "buffer", "input")] == [
        "conv", "norm", "activation", "conv", "activation", "conv", "add", "activation", "reduce", "linear",
    ]  # fmt: skip


def test_layer_output_is_the_value_before_an_in_place_consumer():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return functional.relu_(self.conv(x)).sum((2, 3))

    model = Writes()
    images = torch.randn(2, 3, 4, 4)
    program = capture(model, images)
    (index,) = program.layers["conv"][-1]
    keep = frozenset({index}) | program.output_indices
    values = Weights(program, model).values()
    values[program.input] = images
    with torch.no_grad():
        Schedule(program, program.ancestors(keep), keep, in_place=True).run(values)
        assert torch.equal(values[index], model.conv(images))
        assert (values[index] < 0).any()


def test_writes_into_the_input_leave_the_users_tensor_alone():
    class Doubles(nn.Module):
        def forward(self, x):
            x.mul_(2)
            return (functional.relu(x) - x).sum((2, 3))

    model = Doubles()
    images = torch.randn(3, 3, 4, 4)
    kept = images.clone()
    found = run(capture(model, images), model, images)
    assert torch.equal(images, kept)
    assert torch.equal(found, model(images.clone()))


def test_writes_into_views_of_the_input_are_refused():
    class Clears(nn.Module):
        def forward(self, x):
            x[:, 0] = 0
            return x.sum((2, 3))

    with pytest.raises(CaptureError, match="writes into its own parameters, buffers or input"):
        capture(Clears(), torch.randn(3, 3, 4, 4))


def test_view_mutation_of_an_intermediate():
    class Masks(nn.Module):
        def forward(self, x):
            y = x + 1
            y[:, 0] = 0
            y[:, 1:].mul_(3)
            return functional.relu(y).sum((2, 3))

    model = Masks()
    images = torch.randn(3, 3, 4, 4)
    assert torch.equal(run(capture(model, images), model, images), model(images))


def test_dict_and_tuple_outputs_keep_their_structure():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            y = self.fc(x.mean((2, 3)))
            return {"out": y, "aux": (y * 2, 7)}

    model = Several()
    images = torch.randn(4, 3, 5, 5)
    found, expected = run(capture(model, images), model, images), model(images)
    assert found["aux"][1] == 7
    assert torch.equal(found["out"], expected["out"])
    assert torch.equal(found["aux"][0], expected["aux"][0])


def test_capture_is_cached_and_shared(model):
    images = torch.randn(2, 3, 9, 7)
    first = capture(model, images)
    assert capture(model, torch.randn(5, 3, 9, 7)) is first
    assert capture(model, torch.randn(2, 3, 8, 8)) is not first
    assert capture(model, images) is first


def test_settings_in_lists_are_the_models_own_after_a_capture(model):
    """torch.export leaves copies of them, which a cache that goes by their identity takes for other settings."""
    stages = model.stages = [{"channels": 8}, (1, 2)]
    images = torch.randn(2, 3, 9, 7)
    first = capture(model, images)
    assert model.stages is stages
    assert capture(model, images) is first


def _in_place(model):
    with torch.no_grad():
        model.fc.weight.mul_(2)


def _through_data(model):
    model.fc.weight.data.mul_(2)


def _replace_data(model):
    model.fc.weight.data = model.fc.weight.data * 2


def _replace_parameter(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)


def _load_state(model):
    state = copy.deepcopy(model.state_dict())
    state["fc.weight"] *= 2
    model.load_state_dict(state)


def _replace_module(model):
    fresh = nn.Linear(8, 5)
    with torch.no_grad():
        fresh.weight.copy_(model.fc.weight * 2)
        fresh.bias.copy_(model.fc.bias)
    model.fc = fresh


@pytest.mark.parametrize("converted", [{}, {"dtype": torch.float64}, {"channels_last": True}])
@pytest.mark.parametrize(
    "change", [_in_place, _through_data, _replace_data, _replace_parameter, _load_state, _replace_module]
)
def test_changed_weights_are_seen_at_once(model, change, converted):
    """Kept `Weights` see every way a weight can change; replacing a module makes a new program."""
    images = torch.randn(2, 3, 9, 7)
    program = capture(model, images)
    weights = Weights(program, model, **converted)

    def score():
        values = weights.values()
        values[program.input] = images.to(converted.get("dtype", torch.float32))
        keep = program.output_indices
        with torch.no_grad():
            Schedule(program, program.ancestors(keep), keep, True).run(values)
        return program.result(values).float()

    before = score()
    assert torch.allclose(before, model(images), atol=1e-5)
    change(model)
    if capture(model, images) is not program:
        program = capture(model, images)
        weights = Weights(program, model, **converted)
    assert torch.allclose(score(), model(images), atol=1e-5)
    assert not torch.allclose(score(), before, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.conv, "padding", (0, 0)),
        lambda m: setattr(m, "relu", nn.GELU()),
        lambda m: setattr(m.norm, "eps", 10.0),
        lambda m: setattr(m, "forward", lambda x: m.fc(m.conv(x).mean((2, 3)))),
        lambda m: setattr(m.conv, "bias", None),
    ],
)
def test_changed_structure_is_captured_anew(model, change):
    images = torch.randn(2, 3, 9, 7)
    before = capture(model, images)
    change(model)
    after = capture(model, images)
    assert after is not before
    assert torch.equal(run(after, model, images), model(images))


def test_programs_do_not_keep_models_alive(model):
    capture(model, torch.randn(2, 3, 9, 7))
    gone = weakref.ref(model)
    del model
    gc.collect()
    # pytest's fixture machinery holds one reference of its own until teardown; make a model it does not know
    mine = trained_statistics(Residual())
    capture(mine, torch.randn(2, 3, 9, 7))
    gone = weakref.ref(mine)
    del mine
    gc.collect()
    assert gone() is None


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(2, 48).sum(1, keepdim=True)


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        if x.mean() > 0:
            x = x * 2
        return self.fc(x.mean((2, 3)))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.mean((2, 3))


class NoGradBlock(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            scale = x.abs().amax((2, 3))
        return x.mean((2, 3)) / scale


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (FixedBatch(), "batch size"),
        (DataDependent(), "torch.export cannot trace it"),
        (Counts(), "its own parameters, buffers"),
        (NoGradBlock(), "no_grad"),
    ],
    ids=["fixed batch", "data dependent", "counts calls", "no_grad block"],
)
def test_what_cannot_be_captured_says_why(model, says):
    images = torch.randn(2, 3, 4, 4)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(CaptureError, match=says):
            capture(model, images)
    if isinstance(model, Counts):
        assert model.calls == 0


def test_models_with_forward_hooks_are_not_captured(model):
    calls = []
    handle = model.conv.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(CaptureError, match="'conv' has forward hooks"):
        capture(model, torch.randn(2, 3, 9, 7))
    assert not calls
    handle.remove()
    assert isinstance(capture(model, torch.randn(2, 3, 9, 7)), Program)


def test_errors_while_running_name_the_node(model):
    program = capture(model, torch.randn(2, 3, 9, 7))
    with pytest.raises(RuntimeError, match=r"while running conv2d \(conv2d\) in module 'conv', .*conv.py:"):
        run(program, model, torch.randn(2, 4, 9, 7))


def test_peak_memory_of_a_run_is_that_of_the_module():
    """Values are dropped after their last reader: as many live at once as in the module itself."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(12)))

        def forward(self, x):
            return self.convs(x).mean((2, 3))

    model = Chain()
    images = torch.randn(4, 4, 64, 64)
    program = capture(model, images)
    keep = program.output_indices
    schedule = Schedule(program, program.ancestors(keep), keep, in_place=True)
    live, most = 0, 0

    class Counting(dict):
        def __setitem__(self, key, value):
            nonlocal live, most
            live += 1
            most = max(most, live)
            super().__setitem__(key, value)

        def __delitem__(self, key):
            nonlocal live
            live -= 1
            super().__delitem__(key)

    values = Counting(Weights(program, model).values())
    values[program.input] = images
    live = 0
    with torch.no_grad():
        schedule.run(values)
    assert most <= 2


@pytest.mark.parametrize("layer", [None, "conv", "norm", "twice"])
def test_folding_batch_norms_changes_nothing_but_rounding(model, layer):
    """In float64: output and gradients of the folded program, wherever it is cut."""
    model = model.double()
    model.conv.bias = None if layer is None else model.conv.bias
    images = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    program = capture(model, images)
    index, name = find_layer(program, model, layer, 2)
    plain, folded = cut(program, index, name), cut(program, index, name, folded=True)
    kinds = [
        node.kind for node in folded.program.nodes if node.index in folded.program.ancestors(program.output_indices)
    ]
    assert ("norm" in kinds) == (layer == "conv")
    found = Bound(folded, model, torch.float64).session().forward(images, "gradients")
    expected = Bound(plain, model, torch.float64).session().forward(images, "gradients")
    torch.testing.assert_close(found.output, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-12, atol=1e-12)
    targets = resolve_targets([0, 1, 4], found.output, 3)
    torch.testing.assert_close(found.gradients(targets), expected.gradients(targets), rtol=1e-12, atol=1e-12)


def test_folded_weights_see_changed_statistics(model):
    images = torch.randn(3, 3, 9, 7)
    program = capture(model, images)
    index, name = find_layer(program, model, None, 2)
    folded = cut(program, index, name, folded=True)
    bound = Bound(folded, model, torch.float32)
    for change in (model.norm.running_mean, model.norm.weight.data, model.conv.bias.data):
        change.add_(1)
        passed = bound.session().forward(images)
        torch.testing.assert_close(passed.output, model(images).detach(), rtol=1e-4, atol=1e-4)
