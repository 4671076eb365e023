"""Sources of images: which items there are, in which order, under which ids and labels, and what each holds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from fastcam.jobs.sources import ItemError, open_source  # noqa: E402
from fastcam.jobs.sources._source import Names, unique  # noqa: E402


def png(grey):
    file = BytesIO()
    Image.new("L", (2, 2), grey).save(file, "PNG")
    return file.getvalue()


def write(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grey))


def keys(source):
    return [source.key(index) for index in range(len(source))]


def labels(source):
    return [source.label(index) for index in range(len(source))]


def greys(source):
    return [int(np.asarray(source.load(index).image)[0, 0, 0]) for index in range(len(source))]


def reasons(source):
    found = {}
    for index in range(len(source)):
        try:
            source.load(index)
        except ItemError as error:
            found[source.key(index)] = str(error)
    return found


def same_after_pickling(source):
    other = pickle.loads(pickle.dumps(source))
    assert keys(other) == keys(source)
    assert labels(other) == labels(source)
    assert other.describe() == source.describe()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda index: other.load(index).digest, range(len(source))))
    assert got == [source.load(index).digest for index in range(len(source))]
    json.dumps(source.describe())


def test_folder_of_classes(tmp_path):
    for grey, name in enumerate(["b/x.png", "a/x.png", "a/deep/y.PNG", "c/ünï.png"]):
        write(tmp_path / name, grey)
    (tmp_path / "a/notes.txt").write_text("no image")
    write(tmp_path / "a/.hidden.png", 9)
    source = open_source(tmp_path)
    assert keys(source) == ["a/deep/y.PNG", "a/x.png", "b/x.png", "c/ünï.png"]
    assert labels(source) == [0, 0, 1, 2]
    assert source.classes == ("a", "b", "c")
    assert greys(source) == [2, 1, 0, 3]
    assert source.load(1).digest == hashlib.sha256(png(1)).hexdigest()[:32]
    assert source.describe()["where"] == str(tmp_path)
    same_after_pickling(source)
    write(tmp_path / "top.png", 5)  # beside class folders there is no saying what a class is
    assert labels(open_source(tmp_path)) == [None] * 5
    assert keys(open_source(tmp_path / "top.png")) == ["top.png"]


def test_folders_that_cannot_be_listed_are_items(tmp_path, monkeypatch):
    """Root may list everything, so the refusal is made here."""
    from fastcam.jobs.sources import folder

    for name in ("a/x.png", "b/y.png", "c/deep/z.png"):
        write(tmp_path / name, 1)
    real = folder.open_file

    def refusing(path, *rest):
        if path.endswith(("/b", "/deep")):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest)

    monkeypatch.setattr(folder, "open_file", refusing)
    source = open_source(tmp_path)
    assert keys(source) == ["a/x.png", "b/", "c/deep/"]
    reason = "this folder cannot be listed, its images are missing: Permission denied"
    assert reasons(source) == {"b/": reason, "c/deep/": reason}
    assert source.classes == ("a", "b", "c")
    assert reasons(pickle.loads(pickle.dumps(source))) == reasons(source)
    monkeypatch.setattr(folder, "open_file", lambda *_: real(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="cannot be listed: No such file"):
        open_source(tmp_path)


def test_what_jobs_made_is_no_data_set(tmp_path):
    """A store and folders of pictures between the images; a folder that was there before is the user's, as ever."""
    from fastcam.jobs.sources.folder import own_folder

    write(tmp_path / "a/x.png", 1)
    write(tmp_path / "maps.zarr/preview.png", 2)
    (tmp_path / "maps.zarr/zarr.json").write_text("{}")
    write(own_folder(tmp_path / "a/pages") / "0.webp", 3)
    write(own_folder(tmp_path / "a") / "y.png", 4)
    assert keys(open_source(tmp_path)) == ["a/x.png", "a/y.png"]
    assert keys(open_source(tmp_path / "a/pages")) == ["0.webp"]  # asked for by name


def test_several_paths_are_one_source(tmp_path):
    for grey, name in enumerate(["set/b/1.png", "set/a/2.png", "set/c/3.png", "else/4.png"]):
        write(tmp_path / name, grey)
    two = [tmp_path / "set/b", tmp_path / "set/a"]
    source = open_source(two)
    assert (keys(source), labels(source), greys(source)) == (["a/2.png", "b/1.png"], [0, 1], [1, 0])
    assert source.describe()["where"] == [str(path) for path in two]
    assert keys(open_source(source.describe()["where"])) == keys(source)
    same_after_pickling(source)
    nested = open_source([tmp_path / "set", tmp_path / "set/a", tmp_path / "else"])
    assert keys(nested) == ["else/4.png", "set/a/2.png", "set/b/1.png", "set/c/3.png"]
    assert keys(open_source([tmp_path / "set/a/2.png", tmp_path / "else/4.png"])) == ["else/4.png", "set/a/2.png"]
    assert keys(open_source([tmp_path / "else/4.png"])) == ["4.png"]
    for name in "pq":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, "0.png", png(5))
    assert keys(open_source([tmp_path / "q.tar", tmp_path / "[p].tar"])) == ["q.tar/0.png", "p.tar/0.png"]
    (tmp_path / "list.csv").write_text("path\nset/a/2.png\n")
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 2), np.uint8))
    for wrong, reason in (
        ([tmp_path / "set", tmp_path / "p.tar"], "of one kind: .*set is a folder, .*p.tar a tar"),
        ([tmp_path / "set", tmp_path / "set/a/2.png"], "set is a folder, .*2.png an image file"),
        ([tmp_path / "list.csv", tmp_path / "p.tar"], "list.csv can only be read alone"),
        ([tmp_path / "x.npy", tmp_path / "x.npy"], "x.npy can only be read alone"),
        ([tmp_path / "p.tar", tmp_path / "gone.tar"], "nothing at .*gone.tar"),
        ([], "at least one path"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_source(wrong)


def test_labels_of_a_model(tmp_path):
    from fastcam.jobs.sources.labels import for_model

    for name in ("emu/a.png", "cat/b.png"):
        write(tmp_path / name, 1)
    source = open_source(tmp_path)
    assert labels(for_model(source, 2, None)) == [0, 1]
    assert labels(for_model(source, 2, ["dog", "fox"])) == [0, 1]
    named = for_model(source, 4, ["dog", "emu", "fox", "cat"])
    assert (labels(named), named.classes) == ([3, 1], ("dog", "emu", "fox", "cat"))
    assert labels(for_model(named, 4, ["dog", "emu", "fox", "cat"])) == [3, 1]
    for classes, names in ((3, None), (None, None), (3, ["emu", "dog", "fox"]), (3, ["emu", "cat", "cat"])):
        other = for_model(source, classes, names)
        assert (labels(other), other.classes) == ([None, None], None)
    assert (labels(source), source.classes) == ([0, 1], ("cat", "emu"))


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "set/a/x.png", 1)
    write(tmp_path / "other/z.png", 2)
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/b").symlink_to(tmp_path / "other")
    (tmp_path / "set/self").symlink_to(tmp_path / "set/self")
    (tmp_path / "set/a/file.png").symlink_to(tmp_path / "other/z.png")
    (tmp_path / "set/a/gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path / "set")
    assert keys(source) == ["a/file.png", "a/gone.png", "a/x.png", "b/z.png"]
    assert reasons(source) == {"a/gone.png": "there is no such file"}


def test_odd_entries_become_items_with_reasons(tmp_path):
    write(tmp_path / "ok.png", 3)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("text")
    write(tmp_path / "folder.png/inside.png", 4)
    source = open_source(tmp_path)
    assert keys(source) == ["empty.jpg", "folder.png/inside.png", "ok.png", "pipe.png", "text.jpg"]
    assert set(reasons(source)) == {"empty.jpg", "pipe.png", "text.jpg"}


def test_paths_beyond_the_systems_limit(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    name = "d" * 200
    for _ in range(25):  # 5000 bytes, PATH_MAX is 4096
        os.mkdir(name, dir_fd=here)
        deeper = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    file = os.open("x.png", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(file, png(42))
    os.close(file)
    os.close(here)
    source = open_source(tmp_path)
    assert keys(source) == ["/".join([name] * 25 + ["x.png"])]
    assert greys(source) == [42]


def test_names_that_are_no_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(png(8))
    source = open_source(tmp_path)
    assert keys(source) == ["caf\\xe9.png"]
    assert greys(source) == [8]
    same_after_pickling(source)


def test_empty_folders_and_unknown_places(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="nothing at"):
        open_source(tmp_path / "missing")
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(ValueError, match="unpack it first"):
        open_source(tmp_path / "x.tar.gz")
    with pytest.raises(TypeError, match="got int"):
        open_source(3)


def test_manifest(tmp_path):
    write(tmp_path / "in/a.png", 1)
    write(tmp_path / "out/b.png", 2)
    table = tmp_path / "in/list.csv"
    table.write_text(
        f"\ufeffpath,label,who\na.png,3,x\n../out/b.png,,x\n{tmp_path}/out/b.png,1.0,x\n"
        "gone.png,0,x\na.png,-1,x\na.png,cat,x\n,2,x\nlist.csv,1,x\n",
        encoding="utf-8",
    )
    source = open_source(table)
    assert keys(source)[:6] == ["a.png", "../out/b.png", f"{tmp_path}/out/b.png", "gone.png", "a.png#2", "a.png#3"]
    assert labels(source) == [3, None, 1, 0, None, None, 2, 1]
    assert [int(np.asarray(source.load(i).image)[0, 0, 0]) for i in range(3)] == [1, 2, 2]
    told = reasons(source)
    assert told["gone.png"] == "there is no such file"
    assert "out of range" in told["a.png#2"]
    assert "'cat' in row 6 of the manifest is no integer" in told["a.png#3"]
    assert "names no path" in told[""]
    assert "no image" in told["list.csv"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\na.png,1\n", "no column 'path': its columns are 'file', 'label'"),
        ("path\n", "has no rows"),
        ("", "no column 'path'"),
        ("path,label\na.png\n", "line 2 has 1 cells for 2 columns"),
        ("path,label\na.png,cat\nb.png,dog\n", "number the classes from 0"),
        ("path,id\na.png,x\nb.png,x\n", "'x' twice, in rows 1 and 2"),
        ("path,path\na.png,b\n", "names a column twice"),
        ('path\n"a.png\n', "cannot be read"),
    ],
)
def test_manifests_that_make_no_sense(tmp_path, text, reason):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        open_source(tmp_path / "list.csv")


def test_manifest_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    write(tmp_path / "a.png", 1)
    table = pyarrow.table({"id": ["p", "q"], "path": ["a.png", "a.png"], "label": [4, None]})
    parquet.write_table(table, tmp_path / "list.parquet")
    source = open_source(tmp_path / "list.parquet")
    assert (keys(source), labels(source), greys(source)) == (["p", "q"], [4, None], [1, 1])
    same_after_pickling(source)
    parquet.write_table(table.select(["id"]), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="no column 'path': its columns are 'id'"):
        open_source(tmp_path / "bad.parquet")


def add(tar, name, data=b"", **facts):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data) if data else None)


def test_webdataset_tar(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "n/000.png", png(1))
        add(tar, "n/000.cls", b"7\n")
        add(tar, "n/000.mask.png", png(99))  # belongs to 000.png
        add(tar, "n/001.json", b'{"label": 2}')
        add(tar, "n/001.png", png(2))
        add(tar, "n/002.png", png(3))
        add(tar, "n/002.json", b'{"caption": "no label"}')
        add(tar, "n/003.png", png(4))
        add(tar, "n/003.cls", b"dog")
        add(tar, "n/000.png", png(5))
        add(tar, "x" * 150 + ".png", png(6))  # a long name, in a header of its own
        add(tar, "readme.txt", b"text")
    source = open_source(path)
    assert keys(source) == ["n/000.png", "n/001.png", "n/002.png", "n/003.png", "n/000.png#2", "x" * 150 + ".png"]
    assert labels(source) == [7, 2, None, None, 7, None]
    assert reasons(source) == {"n/003.png": "label 'dog' in '003.cls' is no integer"}
    got = [int(np.asarray(source.load(i).image)[0, 0, 0]) for i in (5, 0, 4, 1, 2)]
    assert got == [6, 1, 5, 2, 3]
    assert source.load(1).digest == hashlib.sha256(png(2)).hexdigest()[:32]
    ok = [0, 1, 2, 4, 5]
    other = pickle.loads(pickle.dumps(source))
    assert [other.load(i).digest for i in ok] == [source.load(i).digest for i in ok]


def test_nothing_in_a_tar_leads_out_of_it(tmp_path):
    write(tmp_path / "secret.png", 200)
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        add(tar, "ok.png", png(1))
        add(tar, "../up.png", png(2))
        add(tar, "/abs.png", png(3))
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.png"))
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="ok.png")
        add(tar, "dev.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "dir.png", type=tarfile.DIRTYPE)
    before = sorted(os.listdir(tmp_path))
    source = open_source(tmp_path / "evil.tar")
    told = reasons(source)
    assert keys(source) == ["ok.png", "../up.png", "/abs.png", "link.png", "hard.png", "dev.png", "pipe.png"]
    assert set(told) == set(keys(source)) - {"ok.png"}
    assert "leads out" in told["../up.png"]
    assert "leads out" in told["/abs.png"]
    assert "links are not followed" in told["link.png"]
    assert "device" in told["dev.png"]
    assert sorted(os.listdir(tmp_path)) == before


def test_several_and_damaged_tars(tmp_path):
    for name in ("b.tar", "a.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for number in range(3):
                add(tar, f"{number}.png", png(number))
    source = open_source(str(tmp_path / "*.tar"))
    assert keys(source) == [f"{tar}.tar/{number}.png" for tar in "ab" for number in range(3)]
    assert greys(source) == [0, 1, 2, 0, 1, 2]
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 1024 + 512 + 40])  # in the middle of the second image
    told = reasons(open_source(tmp_path / "cut.tar"))
    assert told == {"1.png": f"the tar ends in the middle of it: 40 of {len(png(1))} bytes are there"}
    (tmp_path / "bad.tar").write_bytes(whole[:1024] + b"garbage!" * 64 + whole[1536:])
    source = open_source(tmp_path / "bad.tar")
    assert keys(source)[0] == "0.png"
    assert "damaged" in reasons(source)[keys(source)[1]]
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.png", png(1))
    with pytest.raises(ValueError, match="unpack it first"):
        open_source(tmp_path / "packed.tar")


def test_arrays_in_memory():
    rng = np.random.default_rng(0)
    last = rng.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    source = open_source(last)
    assert (len(source), keys(source), labels(source)) == (3, ["0", "1", "2"], [None] * 3)
    np.testing.assert_array_equal(source.load(2).image, last[2])
    assert source.load(2).digest == hashlib.sha256(last[2].tobytes()).hexdigest()[:32]
    first = open_source(torch.from_numpy(last).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(first.load(1).image, last[1])
    np.testing.assert_array_equal(open_source(last[..., 0]).load(1).image, last[1][..., :1])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ready = torch.randn(2, 4, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
        image = open_source(ready).load(1).image
        assert image.dtype == torch.float32
        assert torch.equal(image, ready[1].float())
    ready[1, 0, 0, 0] = torch.nan
    assert open_source(ready).load(0).image.shape == (4, 3, 3)
    with pytest.raises(ItemError, match="1 of its values are NaN"):
        open_source(ready).load(1)
    assert open_source(last).describe() != open_source(last + np.uint8(1)).describe()
    same_after_pickling(source)
    for wrong, error in (
        (last[0], ValueError),
        (last.astype(np.int64), TypeError),
        (np.zeros((0, 3, 2, 2), np.float32), ValueError),
        (np.zeros((2, 5, 5), np.float32), ValueError),
        (np.zeros((2, 5, 5, 4), np.uint8), ValueError),
    ):
        with pytest.raises(error, match="memory"):
            open_source(wrong)


def test_numpy_files(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "stored.npz", other=np.arange(3), images=np.asfortranarray(array))
    np.savez_compressed(tmp_path / "packed.npz", x=array)
    for name in ("a.npy", "stored.npz", "packed.npz"):
        source = open_source(tmp_path / name)
        for row in range(4):
            np.testing.assert_array_equal(source.load(row).image, array[row])
        assert source.load(0).digest == hashlib.sha256(array[0].tobytes()).hexdigest()[:32]
        same_after_pickling(source)
    assert isinstance(open_source(tmp_path / "a.npy")._array, np.memmap)
    assert isinstance(open_source(tmp_path / "stored.npz")._array.base, np.memmap)
    np.save(tmp_path / "f.npy", array.transpose(0, 3, 1, 2).astype(np.float32))
    assert torch.equal(
        open_source(tmp_path / "f.npy").load(1).image, torch.from_numpy(array[1]).permute(2, 0, 1).float()
    )


def test_numpy_files_with_objects_run_nothing(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "evil.npz", images=np.array([Evil()], dtype=object))
    for name in ("evil.npy", "evil.npz"):
        with pytest.raises(ValueError, match=r"pickle|object"):
            open_source(tmp_path / name)
    assert not marker.exists()
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(tmp_path / "cut.npy")


def test_zarr_arrays(tmp_path):
    zarr = pytest.importorskip("zarr")
    array = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    stored = zarr.create_array(str(tmp_path / "a.zarr"), shape=array.shape, chunks=(3, 6, 5, 3), dtype="uint8")
    stored[:] = array
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    group.create_array("images", data=array, chunks=(2, 6, 5, 3))
    group.create_array("labels", data=np.arange(7))
    for name in ("a.zarr", "g.zarr"):
        source = open_source(tmp_path / name)
        for row in (6, 0, 3, 2):
            np.testing.assert_array_equal(source.load(row).image, array[row])
        same_after_pickling(source)


def test_labels_from_a_file(tmp_path):
    for name in "abc":
        write(tmp_path / f"set/{name}.png", ord(name))
    table = tmp_path / "labels.csv"
    table.write_text("id,label\nc.png,5\na.png,x\nunknown.png,1\n")
    source = open_source(tmp_path / "set", labels=table)
    assert labels(source) == [None, None, 5]
    assert "'x' in row 2 of labels.csv" in reasons(source)["a.png"]
    assert source.describe()["labels"] == str(table)
    np.save(tmp_path / "labels.npy", np.array([2, 0, 1]))
    assert labels(open_source(tmp_path / "set", labels=tmp_path / "labels.npy")) == [2, 0, 1]
    table.write_text("label\n1\n")
    with pytest.raises(ValueError, match="1 labels for 3 items"):
        open_source(tmp_path / "set", labels=table)
    table.write_text("id,label\nz.png,1\n")
    with pytest.raises(ValueError, match="labels none of the 3 items"):
        open_source(tmp_path / "set", labels=table)


@pytest.mark.peers
def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "file.png", 3)
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": [{"bytes": png(1), "path": None}, {"bytes": None, "path": str(tmp_path / "file.png")},
                        {"bytes": b"broken", "path": None}, None], "kind": [1, 0, 1, 0]}  # fmt: skip
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    source = open_source(tmp_path / "saved")
    assert (keys(source), labels(source)) == (["0", "1", "2", "3"], [1, 0, 1, 0])
    assert source.classes == ("cat", "dog")
    assert [int(np.asarray(source.load(i).image)[0, 0, 0]) for i in (0, 1)] == [1, 3]
    assert set(reasons(source)) == {"2", "3"}
    assert pickle.loads(pickle.dumps(source)).load(1).digest == source.load(1).digest
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"name one of them: .*train"):
        open_source(tmp_path / "splits")


def test_missing_packages_end_with_the_command(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).write_text("{}")
    (tmp_path / "list.parquet").touch()
    for package, place in (("datasets", "saved"), ("pyarrow", "list.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"pip install {package}"):
            open_source(tmp_path / place)


def test_packed_names():
    names = Names(["", "a", "ünï", "\udce9"])
    assert list(names) == ["", "a", "ünï", "\udce9"]
    assert names[-1] == "\udce9"
    assert Names(["ab", "c"]).digest() != Names(["a", "bc"]).digest()
    with pytest.raises(IndexError):
        names[4]
    assert unique(["a", "a", "a#2", "a"]) == ["a", "a#2", "a#2#2", "a#3"]
