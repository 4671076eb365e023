"""`profile` end to end on tiny networks, with clocks that give times known in advance."""

from __future__ import annotations

import copy
import csv
import html
import importlib
import io
import json
import re

import pytest
import torch

import fastcam
from fastcam import profiling
from fastcam._testing import models
from fastcam.cli import main
from fastcam.profiling import measure, peers, run
from fastcam.profiling.instrument import PARTS
from fastcam.profiling.progress import Progress
from fastcam.profiling.report import COLUMNS, OP_COLUMNS, fastest

backends = importlib.import_module("fastcam.backends")  # the package has a function of that name
OURS = "cpp" if "cpp" not in fastcam.backends()["ops"]["cam_map"]["cpu"]["reasons"] else "reference"


class Ticks:
    """A clock of the instrument that gives each stretch between two marks one second."""

    def __init__(self, *_):
        self.now = 0

    def mark(self):
        self.now += 1
        return self.now

    def finish(self):
        pass

    def between(self, first, second):
        return float(second - first)


@pytest.fixture
def clocks(monkeypatch):
    """Every call takes half a second, every stretch inside it one second of its own clock; copies run at 2 GB/s."""

    def seconds_of(call, device="cpu"):
        call()
        return 0.5

    monkeypatch.setattr(measure, "seconds_of", seconds_of)
    monkeypatch.setattr(run, "clock_for", Ticks)
    monkeypatch.setattr("fastcam.profiling.roofs.copy_gbps", lambda nbytes, device: 2.0)
    monkeypatch.setattr("fastcam.profiling.results.copy_gbps", lambda nbytes, device: 2.0)


def profile(methods=("grad_cam",), model=None, **options):
    options = {"batch": [2], "image_size": 16, "rounds": 3} | options
    return profiling.profile(model or models.vgg_like(), list(methods), device="cpu", **options)


def test_figures_follow_from_the_clock(clocks):
    report = profile(["grad_cam", "lrp"], batch=[1, 4])
    for batch in (1, 4):
        plain = report.row("forward", batch=batch)
        assert plain["images_per_s"] == batch / 0.5
        assert plain["n"] == 2 * 3  # beside either method
        for method in ("grad_cam", "lrp"):
            row = report.row(method, backend=OURS, batch=batch)
            assert (row["median_us"], row["iqr_us"], row["n"]) == (5e5, 0, 3)
            assert row["images_per_s"] == batch / 0.5
            assert row["times_forward"] == 1.0
            assert row["instrument_overhead"] == 0.0
            assert row["match"] is True
            assert row["max_err"] < 1e-4
    assert fastest(report.rows, "lrp", 4, "fp32")["match"]
    assert fastest(report.rows, "lrp", 5, "fp32") is None


def test_work_of_the_plain_forward_pass(clocks):
    plain = profile().row("forward")
    # Two 3 x 3 convolutions (16 x 16 and, with stride 2, 8 x 8), two linear layers; two images.
    flops = 2 * 2 * (256 * 6 * 27 + 64 * 8 * 54 + 12 * 32 + 5 * 12)
    assert plain["flops"] == flops
    assert plain["op_calls"] == 8  # convolution and ReLU twice, average pool, linear, ReLU, linear


def test_a_forward_pass_that_fails_is_a_row_and_the_others_go_on(clocks):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = models.vgg_like()

        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("no double here")
            return self.inner(x)

    report = profile(model=Half(), precision=["fp64", "fp32"], layer="inner.features")
    assert report.rows[0]["error"] == "RuntimeError: no double here"
    assert (report.rows[0]["precision"], report.rows[0]["median_us"]) == ("fp64", None)
    assert report.row("grad_cam", backend=OURS)["precision"] == "fp32"


def test_parts_add_up_to_the_call(clocks):
    row = profile().row("grad_cam", backend=OURS)
    assert set(row["stages_us"]) == set(PARTS)
    assert sum(row["stages_us"].values()) == pytest.approx(row["median_us"], rel=1e-5)  # six digits are stored
    # Marks: head and trunk begin, trunk and head end, rules begins, an op's two inside, rules ends; post the same; the
    # end. A second passes between two of them: head 2 (around the trunk), trunk 1, rules and post 3 each, other 4.
    ticks = {"trunk": 1, "head": 2, "rules": 3, "post": 3, "other": 4}
    assert {part: round(us / 5e5 * 13, 3) for part, us in row["stages_us"].items()} == ticks


def test_ops_have_their_bandwidth(clocks):
    ops = {op["op"]: op for op in profile().row("grad_cam", backend=OURS)["ops"]}
    assert list(ops) == ["channel_weights", "cam_map"]
    one = ops["channel_weights"]
    # (2, 8, 8, 8) features and gradients in, (2, 8) weights out; one second, and copying as much takes bytes / 2e9.
    assert one["bytes"] == 4 * (2 * 2 * 8 * 8 * 8 + 2 * 8)
    assert (one["calls"], one["us"]) == (1, 1e6)
    assert one["gbps"] == pytest.approx(one["bytes"] / 1e9)
    assert one["pct_copy"] == pytest.approx(100 * one["bytes"] / 2e9, rel=1e-5)
    assert one["flops"] == 2 * 2 * 8 * 8 * 8


@pytest.mark.skipif(OURS == "reference", reason="needs the C++ extension")
def test_a_wrong_backend_is_shown_and_gets_no_speed(clocks, monkeypatch, tmp_path, capsys):
    right = backends.implementation("cam_map", "cpu")

    def wrong(*args, **kwargs):
        maps, raw, finite = right(*args, **kwargs)
        return maps * 0.9, raw, finite

    monkeypatch.delitem(backends._PLAIN_CALLS, "cam_map")
    monkeypatch.setitem(backends._TABLE, ("cam_map", "cpu", "cpp"), wrong)
    report = profile(["grad_cam"], out=tmp_path)
    row = report.row("grad_cam", backend="cpp")
    assert row["match"] is False
    assert row["max_err"] == pytest.approx(0.1, rel=1e-4)
    assert row["median_us"] is None
    for claim in ("images_per_s", "speedup", "times_forward", "stages_us", "ops"):
        assert not row.get(claim)
    assert report.row("grad_cam", backend="reference")["images_per_s"] == 4.0
    assert "MISMATCH: differs from the reference by 0.1; not timed" in (tmp_path / "profile.html").read_text()
    assert re.search(r"grad_cam +cpp +2 +fp32 +MISMATCH .*1\.0e-01", str(report))
    assert fastest(report.rows, "grad_cam", 2, "fp32")["backend"] == "reference"


def test_csv_json_and_html_agree(clocks, tmp_path):
    report = profile(["grad_cam", "cam"], out=tmp_path)  # cam does not fit this head
    document = json.loads((tmp_path / "profile.json").read_text())
    assert document == report.document
    lines = list(csv.DictReader(io.StringIO((tmp_path / "profile.csv").read_text())))
    assert tuple(lines[0]) == COLUMNS
    page = html.unescape((tmp_path / "profile.html").read_text())
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    assert [line["name"] for line in lines] == [row["name"] for row in document["results"]]
    for line, row in zip(lines, document["results"], strict=True):
        assert line["median_us"] == str(row["median_us"] or "")
        assert line["match"] == str(row["match"])
        if row.get("error"):
            assert "cam needs a head that averages" in row["error"]
            assert row["error"] in page
            continue
        assert float(line["images_per_s"]) == row["images_per_s"]
        assert f"<td>{row['images_per_s']:.1f}</td>" in page
        for part, us in (row.get("stages_us") or {}).items():
            assert float(line[f"stage_{part}_us"]) == us
    ops = list(csv.DictReader(io.StringIO((tmp_path / "ops.csv").read_text())))
    stored = [(row["name"], op["op"], op["bytes"]) for row in document["results"] for op in row.get("ops", [])]
    assert [(op["name"], op["op"], int(op["bytes"])) for op in ops] == stored
    assert tuple(ops[0]) == ("name", *OP_COLUMNS)


def test_bf16_is_held_against_fp32():
    row = profile(precision=["bf16"]).row("grad_cam", backend=OURS)
    assert 0.98 < row["cosine_fp32"] <= 1
    assert row["precision"] == "bf16"


def test_a_network_of_another_type_is_profiled_in_its_own(clocks):
    report = profile(model=models.vgg_like().double(), precision=["fp64"])
    assert report.row("grad_cam", backend=OURS)["max_err"] < 1e-12
    assert report.row("forward")["images_per_s"] == 4.0


@pytest.mark.parametrize("peers", [False, pytest.param(True, marks=pytest.mark.peers)])
def test_the_model_is_left_as_it_is(peers):
    model = models.vgg_like().train()
    before = copy.deepcopy(model.state_dict())
    profile(model=model, peers=peers)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_trace_holds_stages_and_ops(tmp_path):
    profile(trace=True, out=tmp_path)
    trace = json.loads((tmp_path / "traces" / f"grad_cam-b2-fp32-{OURS}.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"fastcam.trunk", "fastcam.head", "fastcam.rules", "fastcam.post", "fastcam.ops.cam_map"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["grad_kam"]}, "did you mean 'grad_cam'"),
        ({"methods": ["sfam"]}, "explains pairs"),
        ({"methods": []}, "at least one method"),
        ({"batch": [0]}, "batch must hold positive integers; got 0"),
        ({"precision": ["fp8"]}, "precision must be of fp32, bf16, fp16, fp64; got 'fp8'"),
        ({"backends": ["cpu"]}, "backends must be of auto, reference, cpp, cuda, triton; got 'cpu'"),
        ({"backends": ["cuda"]}, "backend 'cuda' cannot run on cpu here"),
        ({"device": "gpu"}, "device must be 'cpu', 'cuda' or 'cuda:N'; got 'gpu'"),
        ({"device": "cuda:63"}, "device 'cuda:63' is not here"),
        ({"trace": True}, "pass out="),
        ({"seconds": 0}, "seconds must be positive; got 0"),
        ({"out": __file__}, "test_profile.py' cannot be written to: File exists"),
        ({"layer": "nowhere"}, "nowhere"),
    ],
)
def test_bad_arguments_are_named(options, message):
    given = {"methods": ["grad_cam"], "device": "cpu"} | options
    with pytest.raises((ValueError, AttributeError), match=message):
        profiling.profile(models.vgg_like(), **given)


def test_a_missing_peer_is_a_line_and_the_others_run(monkeypatch):
    def importable(module):
        raise ImportError(f"No module named '{module}'")

    monkeypatch.setattr(peers, "_importable", importable)
    report = profile(peers=True)
    assert report.notes == [
        f"{package} is not installed (No module named '{module}'); pip install --no-deps {package}"
        for package, (module, covered, _) in peers.PACKAGES.items()
        if "grad_cam" in covered
    ]
    assert report.row("grad_cam", backend=OURS)["match"]
    assert "grad-cam is not installed" in str(report)


def test_a_peer_is_compared_before_it_is_timed(clocks, monkeypatch):
    def calls(job):
        good = fastcam.attribute(job.model, job.images, job.method, targets=job.targets, normalize=False, size="layer")
        yield peers.PeerCall("good", lambda: good.raw * 3)  # its scale is its own business
        yield peers.PeerCall("bad", lambda: good.raw.flip(-1))
        yield peers.PeerCall("absent", None, "absent cannot")

    monkeypatch.setattr(peers, "peer_calls", calls)
    report = profile(peers=True)
    good, bad = (report.row("grad_cam", backend=name) for name in ("good", "bad"))
    assert good["match"] is True
    assert (good["median_us"], good["times_ours"], good.get("stages_us")) == (5e5, 1.0, None)
    assert bad["match"] is False
    assert bad["median_us"] is None
    assert report.notes == ["absent cannot"]


@pytest.mark.peers
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "guided_backprop", "lrp"])
def test_peers_agree(method):
    report = profile([method], peers=True, image_size=32)
    assert report.notes == []
    found = [row for row in report.rows if row["backend"] in peers.PACKAGES]
    assert found
    assert all(row["match"] for row in found), [row.get("error") or row["max_err"] for row in found]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_drawn_on_a_terminal_only():
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        with Progress(4, stream=stream) as bar:
            bar.step("one")
            bar.step("two")
        assert ("0/4 one" in stream.getvalue()) is shown
        assert ("[######..................] 1/4 two" in stream.getvalue()) is shown
        assert stream.getvalue().endswith("\r") or not shown


FACTORY = "fastcam._testing.models:vgg_like"


def test_the_command_prints_a_table_and_writes_a_report(tmp_path, capsys):
    words = ["--model", FACTORY, "--methods", "grad_cam,cam", "--batch", "1", "--image-size", "16", "--rounds", "1"]
    assert main(["profile", *words, "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"grad_cam +{OURS} +1 +fp32 +[\d.]+", printed)
    assert "cam, -: ValueError: cam needs a head that averages" in printed
    assert f"report: {tmp_path}/profile.html" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.csv", "ops.csv", "profile.html"}
    assert main(["profile", *words[:3], "cam", *words[4:], "--device", "cpu"]) == 1  # nothing could be measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "grad_kam"], "did you mean 'grad_cam'"),
        (["--device", "gpu"], "device must be 'cpu', 'cuda' or 'cuda:N'"),
        (["--model", "torchvision:resnet_fifty"], "resnet"),
        (["--model", "fastcam._testing.models:nothing"], "nothing"),
        (["--batch", "1,x"], "must be a positive integer, got 'x'"),
    ],
)
def test_the_command_refuses_with_status_2(words, message, capsys):
    given = {"--model": FACTORY, "--methods": "grad_cam", "--batch": "1"} | {words[0]: words[1]}
    try:
        status = main(["profile", *(word for pair in given.items() for word in pair)])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
