"""What files from strangers can do: what they cost, where they lead, and that none of them runs code."""

import os
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_coca.inference import limits, open_images
from modeling_coca.inference.loading import open_image
from modeling_coca.training import SkippedImages, load_data


def save_picture(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def read_all(shards):
    """id -> the image's bytes or path, or why it was refused."""
    found = {}
    for shard in shards:
        for name, key in shard.list():
            try:
                found[name] = shard.read(key)[0]
            except ValueError as error:
                found[name] = error
    return found


@pytest.fixture
def places(tmp_path):
    """A folder `data` with a picture, one beside it that is none of its business, and a link that leads there."""
    save_picture(tmp_path / "data/own.png")
    secret = save_picture(tmp_path / "secret/private.png")
    (tmp_path / "data/link.png").symlink_to(secret)
    (tmp_path / "data/linked").symlink_to(tmp_path / "secret")
    return tmp_path


ESCAPES = [
    "../secret/private.png",
    "{root}/secret/private.png",
    "link.png",
    "linked/private.png",
    "a/../../secret/private.png",
]


# ------------------------------------------------------------------------------------------------ where paths lead


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_paths_in_data_open_nothing_outside_their_folder(kind, escape, places):
    escape, data = escape.format(root=places), places / "data"
    if kind == "csv":
        (data / "list.csv").write_text(f"path\nown.png\n{escape}\n")
        source = data / "list.csv"
    elif kind == "jsonl":
        (data / "list.jsonl").write_text(f'{{"path": "own.png"}}\n{{"path": "{escape}"}}\n')
        source = data / "list.jsonl"
    elif kind == "parquet":
        images = pa.array([{"bytes": None, "path": "own.png"}, {"bytes": None, "path": escape}])
        pq.write_table(pa.table({"image": images}), data / "set.parquet")
        source = data / "set.parquet"
    else:  # as `save_to_disk` never writes it: a path without the bytes
        features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
        rows = [{"bytes": None, "path": str(data / path)} for path in ("own.png", escape)]
        datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(data / "saved")
        source = data / "saved"
    own, other = read_all(open_images(source, image_root=data if kind == "saved" else None)).values()
    assert os.path.samefile(own, data / "own.png")
    assert isinstance(other, ValueError) and "leads out of" in str(other) and "`image_root`" in str(other)
    own, other = read_all(open_images(source, image_root=places)).values()  # the user says that it may
    if "a/.." not in escape:
        assert os.path.samefile(other, places / "secret/private.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("escape", [*ESCAPES, "file://{root}/secret/private.png", "http://127.0.0.1:9/private.png"])
def test_paths_in_training_data_open_nothing_outside_their_folder(streaming, escape, places):
    data = places / "data"
    (data / "all.csv").write_text(f"image,text\nown.png,mine\n{escape.format(root=places)},not mine\n")
    skipped = SkippedImages()
    options = {"data_files": {"train": str(data / "all.csv")}, "streaming": streaming, "skipped": skipped}
    assert [row["text"] for row in load_data(**options)["train"]] == ["mine"]
    (entry,) = skipped.entries()
    assert ("is a URL" if "://" in escape else "leads out of") in entry["error"]
    if "://" not in escape and "a/.." not in escape:
        assert len(list(load_data(**options, image_root=places)["train"])) == 2


def test_a_folder_cannot_name_files_elsewhere_in_its_own_description(places):
    """`datasets` follows `data_files` in a folder's README.md wherever they lead."""
    described = places / "described"
    described.mkdir()
    (described / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../secret/*.png\n---\n")
    with pytest.raises(ValueError, match=r"Not one image of 'train'.*leads out of"):
        load_data(described)


def test_a_table_that_leads_elsewhere_from_its_first_row_is_refused_at_once(places):
    (places / "data/list.csv").write_text("path\n/etc/hostname\n")
    with pytest.raises(ValueError, match=r"/etc/hostname leads out of .*data: say by `image_root`"):
        open_images(places / "data/list.csv")


def test_links_in_a_folder_lead_nowhere_else_and_not_in_circles(places):
    data = places / "data"
    save_picture(data / "sub/two.png")
    (data / "sub/up").symlink_to(data)
    (data / "sub/again.png").symlink_to(data / "own.png")
    names = {os.path.relpath(name, data) for name in read_all(open_images(data))}
    assert {"own.png", "sub/two.png", "sub/again.png"} <= names and not any(
        "private" in n or n == "link.png" for n in names
    )
    assert len(names) < 10
    everything = {os.path.realpath(name) for name in read_all(open_images(data, image_root=places))}
    assert str(places / "secret/private.png") in everything
    (places / "links").mkdir()
    (places / "links/a").symlink_to(places / "secret")
    with pytest.raises(ValueError, match=r"1 links lead out of .* by `image_root`"):
        open_images(places / "links")


def test_a_repository_in_the_cache_of_the_hub_is_links_into_its_own_folder(tmp_path):
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots/0123/train"
    blob = save_picture(repository / "blobs/x.png")
    snapshot.mkdir(parents=True)
    (snapshot / "1.png").symlink_to(blob)
    for folder in (snapshot.parent, snapshot):
        (image,) = read_all(open_images(folder)).values()
        assert os.path.samefile(image, blob)


def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # would be waited for
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ValueError, match="no plain file"):
            open_image(str(path))


# -------------------------------------------------------------------------------------------------- what files cost


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_refused_by_their_header(tmp_path, monkeypatch):
    large, jpeg = save_picture(tmp_path / "large.png", (10, 11)), save_picture(tmp_path / "large.jpg", (32, 6))
    (tmp_path / "all.csv").write_text("image,text\nlarge.png,x\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(ValueError, match="10 x 11 pixels are more than the 100"):
            open_image(str(large))
        with pytest.raises(ValueError, match="10 x 11 pixels are more than the 100"):
            load_data(tmp_path / "all.csv")
    assert open_image(str(jpeg), at_least=2).size < (32, 6)


def test_no_image_is_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("ran"))
    save_picture(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "harmless.png")
    (tmp_path / "all.csv").write_text("image,text\nharmless.png,x\n")
    with pytest.raises(ValueError, match="Ghostscript"):
        open_image(str(tmp_path / "harmless.png"))
    with pytest.raises(ValueError, match="Ghostscript"):
        load_data(tmp_path / "all.csv")


@pytest.mark.parametrize("column", ["image", "jpg"])
def test_a_parquet_file_of_some_hundred_bytes_does_not_become_gigabytes(column, tmp_path):
    """One value that a thousand rows share: 300 MB, were each to have a copy."""
    value = b"x" * 300_000
    values = pa.array([value] * 1000)
    if column == "image":
        values = pa.StructArray.from_arrays([values, pa.nulls(1000, pa.string())], ["bytes", "path"])
    pq.write_table(pa.table({column: values}), tmp_path / "bomb.parquet", compression="zstd")
    assert os.path.getsize(tmp_path / "bomb.parquet") < 5000
    before = pa.total_allocated_bytes()
    (shard,) = open_images(tmp_path / "bomb.parquet")
    assert shard.read(0)[0] == shard.read(999)[0] == value
    assert pa.total_allocated_bytes() - before < 10e6


def test_row_groups_and_tar_members_have_bounds(tmp_path, monkeypatch):
    for name, sizes in {"large": (6000, 10), "fine": (3000, 9000)}.items():
        columns = {column: [os.urandom(size)] for column, size in zip(("jpg", "other"), sizes, strict=True)}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", write_statistics=False)
    monkeypatch.setattr(limits, "MAX_ROW_GROUP_BYTES", 5_000)
    (refused,) = read_all(open_images(tmp_path / "large.parquet")).values()
    assert "more than the 5,000 that are read: write the file anew" in str(refused)
    (fine,) = read_all(open_images(tmp_path / "fine.parquet")).values()
    assert len(fine) == 3000

    monkeypatch.setattr(limits, "MAX_VALUE_BYTES", 500)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, size in (("a.png", 500), ("b.png", 501)):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, open("/dev/zero", "rb"))
    small, large = read_all(open_images(tmp_path / "set.tar")).values()
    assert len(small) == 500 and "501 bytes are more than the 500 that are read" in str(large)


def test_members_of_a_tar_write_nothing_and_link_to_nothing(tmp_path):
    """`../` in a name names a sample; links, devices and sparse files, which claim any size, are passed over."""
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, kind in (
            ("../../up.png", tarfile.REGTYPE),
            ("/abs.png", tarfile.REGTYPE),
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("device.png", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    assert sorted(read_all(open_images(tmp_path / "set.tar"))) == [
        f"{tmp_path}/set.tar/../../up",
        f"{tmp_path}/set.tar//abs",
    ]
    assert sorted(tmp_path.rglob("*")) == before
