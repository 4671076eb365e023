"""Stages and ops of a call: what the instrument makes of known times, and what the pipeline tells it."""

from __future__ import annotations

import threading

import pytest
import torch

import fastcam
from fastcam import _watch
from fastcam._testing import models
from fastcam._watch import stage, watched_by
from fastcam.profiling.instrument import PARTS, Instrument, RangeWatcher


class FakeClock:
    """Time passes only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def finish(self):
        pass

    def between(self, first, second):
        return second - first


class Log:
    """Writes down what it is told."""

    def __init__(self):
        self.lines: list[str] = []

    def enter(self, name):
        self.lines.append(name)

    def leave(self, name):
        self.lines.append(f"/{name}")

    def op(self, name, call, args, kwargs):
        self.lines.append(f"op {name}")
        return call(*args, **kwargs)

    @property
    def stages(self):
        return [line for line in self.lines if not line.startswith("op ")]


def test_time_belongs_to_the_innermost_stage_and_the_parts_add_up():
    clock = FakeClock()

    def spend(seconds):
        clock.now += seconds

    def call():
        spend(1)
        with stage("head"):
            spend(2)
            with stage("trunk"):
                spend(4)
            spend(8)
        spend(16)
        with stage("rules"):
            spend(32)
            found = _watch.current().op("cam_map", lambda value: spend(64) or value, (5,), {})
            assert found == 5
        with stage("post"):
            spend(128)

    split = Instrument(clock).measure(call)
    assert split.parts == {"trunk": 4, "head": 10, "rules": 96, "post": 128, "other": 17}
    assert split.total == sum(split.parts.values()) == clock.now
    assert split.ops == [("cam_map", 64)]


def test_an_instrument_starts_afresh_after_an_exception():
    clock = FakeClock()

    def fails():
        clock.now += 5
        with stage("rules"):
            raise KeyError("x")

    def works():
        with stage("post"):
            clock.now += 3

    instrument = Instrument(clock)
    with pytest.raises(KeyError):
        instrument.measure(fails)
    assert _watch.current() is None
    assert instrument.measure(works).parts == dict.fromkeys(PARTS, 0.0) | {"post": 3}


def test_real_marks_add_up_too():
    explainer = fastcam.Explainer(models.vgg_like(), "lift_cam")
    images = torch.randn(2, 3, 24, 24)
    explainer(images)
    from fastcam.profiling.instrument import clock_for

    split = Instrument(clock_for("cpu")).measure(lambda: explainer(images))
    assert split.total == pytest.approx(sum(split.parts.values()))
    assert all(seconds > 0 for seconds in split.parts.values())
    assert sum(seconds for _, seconds in split.ops) < split.total


CALL = ["head", "trunk", "/trunk", "/head", "rules", "/rules", "post", "/post"]


def told(method, model=None, **options) -> Log:
    log = Log()
    explainer = fastcam.Explainer(model or models.vgg_like(), method, **options)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    explainer(images)
    with watched_by(log):
        explainer(images)
    return log


@pytest.mark.parametrize("method", ["grad_cam", "lift_cam", "relevance_cam", "attribution_equilibrium"])
def test_the_pipeline_names_its_stages(method):
    stages = told(method).stages
    assert stages[:3] == CALL[:3]
    assert stages[-4:] == CALL[-4:]
    assert stages.count("trunk") == stages.count("/trunk") == 1


def test_closed_form_and_pixel_methods_run_through_the_same_stages():
    assert told("grad_cam", models.gap_linear()).stages == [
        *("head", "trunk", "/trunk", "head", "/head", "/head", "rules", "/rules", "post", "/post")
    ]
    log = told("lrp")
    assert log.stages == CALL
    assert "op relevance_divide" in log.lines
    assert log.lines[-3:] == ["post", "op cam_map", "/post"]


def test_a_model_that_is_run_through_a_hook_is_split_at_the_hook():
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = models.gap_linear()

        def forward(self, x):
            return self.inner(x) if bool(x.sum() > -1e30) else x.flatten(1)

    stages = told("grad_cam", Branching(), layer="inner.features").stages
    assert stages == ["head", "trunk", "/trunk", "head", "/head", "/head", "rules", "/rules", "post", "/post"]


def test_masked_forward_passes_count_as_trunk():
    log = told("score_cam", models.gap_linear(), chunk=6)
    # Two images' six maps, six masked images a pass, each by the folded network.
    assert log.stages.count("trunk") == 1 + 2
    rules = log.stages[log.stages.index("rules") : log.stages.index("/rules")]
    assert rules.count("trunk") == 2


def test_the_watcher_sees_its_own_thread_only_and_results_are_the_same():
    model, images = models.gap_linear(), torch.randn(1, 3, 16, 16)
    plain = fastcam.attribute(model, images, "grad_cam").maps
    log, other = Log(), Log()
    with watched_by(log):
        thread = threading.Thread(target=lambda: other.lines.append(str(_watch.current())))
        thread.start()
        thread.join()
        watched = fastcam.attribute(model, images, "grad_cam").maps
    assert other.lines == ["None"]
    assert torch.equal(plain, watched)
    assert _watch.current() is None
    with pytest.raises(ValueError, match="not finite"), watched_by(log):
        fastcam.attribute(model, images * float("nan"), "grad_cam")
    assert _watch.current() is None


def test_ranges_are_opened_and_closed_around_stages_and_ops():
    lines: list[str] = []
    watcher = RangeWatcher(lines.append, lambda: lines.append("end"))
    with watched_by(watcher):
        with stage("post"):
            watcher.op("cam_map", lambda: None, (), {})
        with pytest.raises(ZeroDivisionError):
            watcher.op("cam_map", lambda: 1 / 0, (), {})
    assert lines == ["fastcam.post", "fastcam.ops.cam_map", "end", "end", "fastcam.ops.cam_map", "end"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has NVTX")
def test_nvtx_without_cuda_says_so():
    with pytest.raises(RuntimeError, match="need a torch built for CUDA"):
        RangeWatcher.nvtx()
