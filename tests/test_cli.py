"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import sys

import pytest

import fastcam
from fastcam.cli import main


def test_methods_lists_all_with_their_sources(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(fastcam.methods())
    for line, facts in zip(lines, fastcam.methods().values(), strict=True):
        assert facts["summary"] in line
        assert facts["source"] in line


def test_info_prints_the_version(capsys):
    assert main(["info"]) == 0
    assert fastcam.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["demos"], "invalid choice: 'demos'"),
        (["demo", "--images", "0"], "positive integer, got '0'"),
        (["demo", "--threads", "two"], "positive integer, got 'two'"),
        (["demo", "--methods", "grad_cam,grad_kam"], "did you mean 'grad_cam'"),
        (["demo", "--methods", ","], "at least one method"),
        (["demo", "--model", "resnet50"], "invalid choice: 'resnet50'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_prints_a_table_and_writes_a_picture(capsys, tmp_path):
    for package in ("sklearn", "skimage", "safetensors", "matplotlib", "zarr"):
        pytest.importorskip(package)
    from PIL import Image

    arguments = ["demo", "--images", "4", "--out", str(tmp_path / "new"), "--methods", "cam,grad_cam"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {(words[0], words[1]): words[2:] for words in map(str.split, lines[1:5])}
    assert set(rows) == {(model, method) for model in ("tiny_resnet", "tiny_vgg") for method in ("cam", "grad_cam")}
    pointing, milliseconds, multiple, backend = rows["tiny_resnet", "grad_cam"]
    assert 0.5 <= float(pointing) <= 1  # of eight pairs; a random pixel has about 0.1
    assert float(milliseconds) > 0
    assert float(multiple) > 0.5
    assert backend in ("cpp", "reference")
    assert rows["tiny_vgg", "cam"] == ["-", "-", "-", "(1)"]  # its head is not pooling + linear
    assert any(line.startswith("(1) cam needs a head") for line in lines)
    path = tmp_path / "new" / "demo.png"
    assert lines[-1] == f"picture: {path}"
    with Image.open(path) as picture:
        assert picture.width > 400
        assert picture.height > 800
    # Three methods and models apply, with 4 images each; a second run finds their maps and explains none again.
    assert lines[-3] == f"maps: {tmp_path / 'new' / 'maps-4'}/, 12 explained in this run"
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "new" / "maps-4").rglob("*") if file.is_file()}
    assert main(arguments) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[-3] == f"maps: {tmp_path / 'new' / 'maps-4'}/, 0 explained in this run"
    assert [line.split()[2] for line in again[1:5]] == [line.split()[2] for line in lines[1:5]]  # the same pointing
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_a_missing_extra_is_one_line_with_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["demo", "--images", "1", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastcam: the testbed needs safetensors")
    assert error.endswith("pip install 'fastcam[testbed]'\n")
