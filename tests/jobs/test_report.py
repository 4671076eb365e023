"""`fastcam report`: the numbers in the page, untrusted names, and thumbnails inside or beside it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
for _package in ("zarr", "matplotlib"):
    pytest.importorskip(_package)

from fastcam.jobs import Store, run  # noqa: E402
from fastcam.jobs.report import _clear, main, report  # noqa: E402

EVIL = "</script><script>alert(1)</script>{{DATA}}<!--&"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(0)
    lines = ["path,label,id"]
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / f"{index}.png")
        lines.append(f"{index}.png,{index % 3},{EVIL if index == 4 else f'item {index}'}")
    (root / "broken.png").write_bytes(b"<b>no</b>")
    (root / "list.csv").write_text("\n".join([*lines, "broken.png,1,bad"]) + "\n")
    run("fastcam._testing.jobs:tiny", root / "list.csv", root / "maps.zarr", workers=1,
        image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)  # fmt: skip
    return root


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id") == "data"

    def handle_data(self, text):
        if self.inside:
            self.data += text
            self.inside = False


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    return text, page, json.loads(page.data)


def test_the_page_holds_the_stores_numbers(job, tmp_path):
    store = Store(job / "maps.zarr")
    text, _, facts = read(report(store, tmp_path / "r.html"))
    assert facts["ids"] == store.ids
    assert facts["status"] == [1] * 6 + [2]
    assert facts["target"][:6] == store.targets[:6].tolist()
    assert facts["label"] == [0, 1, 2, 0, 1, 2, 1]
    shares = np.exp(store.scores.astype(float))
    shares /= shares.sum(1, keepdims=True)
    np.testing.assert_allclose(facts["score"][:6], [shares[i, i % 3] for i in range(6)], atol=1e-5)
    assert facts["score"][6] is None
    assert facts["reasons"][facts["reason"][6]] == store.errors[6] != ""
    height, width = facts["shape"]
    maps = np.frombuffer(base64.b64decode(facts["maps"]), np.uint8).reshape(7, height, width)
    for row in range(6):
        np.testing.assert_allclose(maps[row] / 255, store.map(row), atol=0.5 / 255 + 1e-6)
    with Image.open(BytesIO(base64.b64decode(facts["thumbnails"][2]))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (16, 16))
    assert facts["thumbnails"][6] is None
    assert f"{len(store)} items: 6 done · 1 failed" in text
    assert "fastcam._testing.jobs:tiny" in text


def test_names_are_text_and_nothing_is_asked_from_outside(job, tmp_path):
    text, page, facts = read(report(job / "maps.zarr", tmp_path / "r.html"))
    assert facts["ids"][4] == EVIL
    assert text.count("alert(1)") == 1  # in the data alone, where "<" is escaped
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "<b>no" not in text
    assert "innerHTML" not in text
    assert not re.search(r"https?://", text)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_many_thumbnails_lie_beside_the_page(job, tmp_path):
    _, _, inside = read(report(job / "maps.zarr", tmp_path / "in.html"))
    size = len(base64.b64decode(inside["thumbnails"][0]))
    path = report(job / "maps.zarr", tmp_path / "r.html", embed=2.5 * size / 1e6)
    _, _, facts = read(path)
    assert facts["folder"] == "r_files"
    assert facts["thumbnails"] == [""] * 6 + [None]
    for row in range(6):
        beside = (tmp_path / "r_files" / f"{row}.webp").read_bytes()
        assert beside == base64.b64decode(inside["thumbnails"][row])
    report(job / "maps.zarr", path)
    assert not (tmp_path / "r_files").exists()


def test_command(job, tmp_path, capsys):
    assert main(["report", str(job / "maps.zarr"), "--out", str(tmp_path / "a/r.html"), "--limit", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a/r.html\n"
    assert read(tmp_path / "a/r.html")[2]["ids"] == ["item 0", "item 1"]
    assert main(["report", str(tmp_path / "no.zarr")]) == 2
    assert "holds no store" in capsys.readouterr().err


def test_only_thumbnails_of_an_earlier_page_are_deleted(tmp_path):
    """Browsers call the pictures of a saved page as we do: `page_files`."""
    folder = tmp_path / "page_files"
    folder.mkdir()
    (folder / "0.webp").write_bytes(b"old")
    _clear(folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"holds 'mine.txt', which no report made"):
        _clear(folder)
    assert (folder / "mine.txt").read_bytes() == b"precious"
