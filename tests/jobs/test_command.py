"""`fastcam run` and `fastcam merge` from the outside: exit codes and what is printed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings

import numpy as np
import pytest

pytest.importorskip("zarr")

from fastcam import jobs
from fastcam.cli import main

MODEL = "fastcam._testing.jobs:tiny"
#: Shells have Ctrl-C ignored in what they begin in the background, and children inherit that.
SHELL = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}


@pytest.fixture
def images(tmp_path):
    """Prepared images in a file, one of which is not finite."""
    array = np.random.default_rng(0).normal(size=(20, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "good.npy", array)
    array[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "bad.npy", array)
    return tmp_path


def call(*words):
    return main(["run", "--model", MODEL, *map(str, words)])


def test_run_resume_and_exit_codes(images, capsys):
    out = images / "a.zarr"
    assert call("--images", images / "good.npy", "--out", out, "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["done"] == summary["items"] == 20
    assert set(summary["split"]) == {"decode", "wait", "attribute", "write"}
    assert printed.err == ""
    assert call("--images", images / "good.npy", "--out", out, "--resume") == 0
    assert capsys.readouterr().out == f"{out}: 20 of 20 done, 0 failed\n"
    assert call("--images", images / "good.npy", "--out", out) == 2
    assert "exists; pass --resume" in capsys.readouterr().err
    assert call("--images", images / "bad.npy", "--out", images / "b.zarr", "--quiet") == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "lift_kam"], "did you mean 'lift_cam'"),
        (["--method", "sfam"], "explains pairs of images"),
        (["--layer", "featuers"], "features"),
        (["--targets", "top9"], "more classes than the model's 5"),
        (["--targets", "17"], "target 17 is out of range"),
        (["--targets", "labels"], "targets 'labels': no item has a label"),
        (["--targets", "best"], "got 'best'"),
        (["--option", "sed=3"], "no option 'sed'"),
        (["--shard", "4/4"], "i from 0 to n - 1"),
        (["--size", "-3"], "size must be layer, input, N or HxW"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--images", "nowhere"], "nowhere"),
        (["--batch-size", "0"], "batch_size must be an integer from 1 up or 'auto', got 0"),
    ],
)
def test_wrong_usage_is_code_2_and_leaves_nothing(images, capsys, words, message):
    given = {"--images": str(images / "good.npy"), "--out": str(images / "a.zarr"), **dict([words])}
    assert call(*(word for pair in given.items() for word in pair)) == 2
    assert message in capsys.readouterr().err
    assert not (images / "a.zarr").exists()


@pytest.mark.parametrize(
    "words",
    [["--dtype", "int3"], ["--batch-size", "many"], ["--option", "=3"], ["--mean", "a,b"], ["--crop", "224,224"]],
)
def test_what_the_parser_refuses(images, words):
    with pytest.raises(SystemExit) as stop:
        call("--images", images / "good.npy", "--out", images / "a.zarr", *words)
    assert stop.value.code == 2


def test_a_machine_that_fails_is_code_1(images, capsys):
    assert call("--images", images / "good.npy", "--out", "/proc/a.zarr") == 1
    assert "cannot write to /proc/a.zarr" in capsys.readouterr().err


def test_under_torchrun_failed_items_are_no_crash(images, capsys, monkeypatch):
    """Any code but 0 makes torchrun end the other shards; the summary keeps the job's own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    words = ["--images", images / "bad.npy", "--json"]
    assert call(*words, "--out", images / "a.zarr") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["exit_code"] == 3
    assert printed.err == "fastcam: exit code 0 in place of 3 (1 items failed) under torchrun\n"
    assert call(*words, "--out", images / "b.zarr", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert call(*words, "--out", images / "b.zarr") == 2  # other codes are as ever


@pytest.mark.slow
def test_torchrun_itself_lets_every_shard_finish(tmp_path):
    """One shard has failed items, and the run as a whole is none that failed; the merge tells."""
    array = np.zeros((6_000, 3, 8, 8), dtype=np.float32)
    array[:100] = np.nan
    np.save(tmp_path / "x.npy", array)
    launcher = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--monitor-interval",
        "0.1",
    ]
    words = ["run", "--model", MODEL, "--images", tmp_path / "x.npy", "--out", tmp_path / "{i}.zarr", "--shard", "auto"]
    extra = ["--threads", "1", "--limit", "5000", "--batch-size", "16", "--workers", "1"]
    done = subprocess.run(
        [*map(str, [*launcher, "-m", "fastcam.cli", *words, *extra])], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    stores = [jobs.Store(tmp_path / f"{rank}.zarr") for rank in range(2)]
    assert [int((store.status == 1).sum()) for store in stores] == [len(stores[0]) - 100, len(stores[1])]
    assert main(["merge", str(tmp_path / "m.zarr"), *(str(store.path) for store in stores)]) == 3


def test_quiet_is_quiet(images, capsys, caplog, monkeypatch):
    """Neither warnings of the package, nor of others, in either of Python's two ways; afterwards both speak again."""

    def talks(*_):
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("fastcam").warning("a line")
        logging.getLogger("zarr").warning("another's line")

    monkeypatch.setattr("fastcam.models.check_finite", talks)
    for words, count in (["--quiet"], 0), ([], 1):
        caplog.clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert call("--images", images / "good.npy", "--out", images / f"{count}.zarr", *words) == 0
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert (len(seen), said) == (count, count * ["a line", "another's line"])
    assert capsys.readouterr().err == ""


def test_several_tars_as_a_shell_names_them(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name in "ab":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in range(2):
                Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
                tar.add(tmp_path / f"{number}.png", f"{number}.png")
    words = ["--image-size", "16", "--mean", "0,0,0", "--std", "1,1,1", "--crop", "squash", "--quiet"]
    assert call("--images", tmp_path / "a.tar", tmp_path / "b.tar", "--out", tmp_path / "m.zarr", *words) == 0
    store = jobs.Store(tmp_path / "m.zarr")
    assert store.ids == ["a.tar/0.png", "a.tar/1.png", "b.tar/0.png", "b.tar/1.png"]
    assert store.provenance["source"]["where"] == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert store.provenance["preprocessing"]["resize"] == [16, 16]
    # The pattern names the same items.
    assert call("--images", tmp_path / "[ab].tar", "--out", tmp_path / "m.zarr", "--resume", *words) == 0


def test_pictures_nobody_knows_how_to_prepare_stop_the_job(tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"broken")
    Image.new("RGB", (16, 16)).save(tmp_path / "photos/b.png")
    for words in [], ["--image-size", "16"]:
        assert call("--images", tmp_path / "photos", "--out", tmp_path / "m.zarr", *words) == 2
        assert "how the model wants its pictures is not known: give image_size=, mean=" in capsys.readouterr().err
        assert not (tmp_path / "m.zarr").exists()


def test_labels_from_numpy(images):
    labels = np.arange(20) % 5
    np.save(images / "labels.npy", labels)
    assert call("--images", images / "good.npy", "--out", images / "a.zarr", "--targets", images / "labels.npy") == 0
    assert np.array_equal(jobs.Store(images / "a.zarr").targets, labels)


def test_options_arrive(images):
    out = images / "a.zarr"
    words = ["--targets", "top2", "--size", "9x5", "--dtype", "float32", "--scores", "targets", "--limit", "18"]
    assert call("--images", images / "good.npy", "--out", out, "--option", "relu=false", *words, "--quiet") == 0
    store = jobs.Store(out)
    assert store.column("maps").shape == (18, 2, 9, 5)
    assert store.column("maps").dtype == np.float32
    assert store.scores.shape == (18, 2)
    assert store.provenance["options"]["relu"] is False
    assert float(np.min(store.column("maps")[:])) < 0  # without ReLU


def test_shards_and_merge(images, capsys):
    for i in range(2):
        assert call("--images", images / "good.npy", "--out", images / "p{i}.zarr", "--shard", f"{i}/2", "--quiet") == 0
    words = [str(images / name) for name in ("m.zarr", "p0.zarr", "p1.zarr")]
    assert main(["merge", *words]) == 0
    assert capsys.readouterr().out.startswith(f"{images / 'm.zarr'}: 20 of 20 done, 0 failed")
    assert main(["merge", *words]) == 2
    inside = images / "p0.zarr" / "all.zarr"
    assert main(["merge", str(inside), *words[1:]]) == 2
    assert f"{inside} lies inside the store" in capsys.readouterr().err
    assert call("--images", images / "good.npy", "--out", inside) == 2
    assert not inside.exists()


def test_a_broken_tar_among_others_is_an_item_that_failed(tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    for name in "ac":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / "0.png", "0.png")
    (tmp_path / "b.tar").write_bytes(b"no tar" * 400)
    (tmp_path / "d.tar").write_bytes(b"")
    words = ["--image-size", "16", "--mean", "0,0,0", "--std", "1,1,1", "--out", tmp_path / "m.zarr"]
    assert call("--images", *(tmp_path / f"{name}.tar" for name in "abcd"), *words) == 3
    store = jobs.Store(tmp_path / "m.zarr")
    assert store.ids == ["a.tar/0.png", "b.tar/", "c.tar/0.png", "d.tar/"]
    assert store.status.tolist() == [1, 2, 1, 2]
    assert all("cannot be read as an uncompressed tar" in store.errors[row] for row in (1, 3))
    assert call("--images", tmp_path / "b.tar", tmp_path / "d.tar", *words[:-1], tmp_path / "n.zarr") == 2
    assert "b.tar cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("delay", [0.3, pytest.param(0.6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_while_it_starts(images, sent, delay):
    """The package's own imports take longer than this."""
    command = [sys.executable, "-P", "-m", "fastcam.cli", "run", "--model", MODEL, "--images", str(images / "good.npy")]
    process = subprocess.Popen([*command, "--out", str(images / "a.zarr")], stderr=subprocess.PIPE, text=True, **SHELL)
    time.sleep(delay)
    os.kill(process.pid, sent)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "fastcam: interrupted\n")


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_is_code_130_and_can_be_gone_on_with(tmp_path, sent):
    """A real process, stopped by a signal after its first results, then resumed to the end."""
    np.save(tmp_path / "x.npy", np.zeros((6_000, 3, 8, 8), dtype=np.float16))
    out = tmp_path / "a.zarr"
    words = ["run", "--model", MODEL, "--images", str(tmp_path / "x.npy"), "--out", str(out), "--shard-rows", "64"]
    command = [sys.executable, "-P", "-m", "fastcam.cli", *words, "--batch-size", "16", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **SHELL)
    while not (out / "status" / "c" / "0").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; what was done is safe, go on with --resume" in error
    assert "Traceback" not in error
    done = int((jobs.Store(out).status == 1).sum())
    assert 64 <= done < 6_000
    assert not list((out / "journal").glob("*"))
