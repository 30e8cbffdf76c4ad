"""Images as people have them, broken and odd ones included: each gives the right pixels, or says what is wrong with it.

A file comes in by several doors: as a path to the processor (both backends), as the PIL image that it opens to, through a
pipeline, and as a row of what `coca caption` reads.
"""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_coca import CocaImageProcessorPil, CocaProcessor
from modeling_coca.inference import ImageLoader, open_images

pytest.importorskip("torchvision")
from modeling_coca import CocaImageProcessor

SIZE = 32  # the tiny model's: pictures of this size come through resize and crop as they are
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
OTHER = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
GREY = PHOTO[..., 0]
BACKENDS = {"pil": CocaImageProcessorPil(size=SIZE), "torchvision": CocaImageProcessor(size=SIZE)}


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of_16_bit_rgb() -> bytes:
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in PHOTO)
    return png(SIZE, SIZE, 16, 2, rows)


def with_orientation(tag: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return encode(PHOTO, kind, exif=exif)


def palette(**options) -> bytes:
    image = Image.fromarray(np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return encode(image, "PNG", **options)


PALETTE_COLORS = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]], dtype=np.uint8)
PALETTE_PICTURE = PALETTE_COLORS[np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 4]
TURNED = {  # of EXIF's orientation: what turns the stored rows upright
    2: PHOTO[:, ::-1],
    3: PHOTO[::-1, ::-1],
    4: PHOTO[::-1],
    5: PHOTO.transpose(1, 0, 2),
    6: np.rot90(PHOTO, -1),
    7: np.rot90(PHOTO, 2).transpose(1, 0, 2),
    8: np.rot90(PHOTO),
}

# name: the file, and the picture that it shows
RIGHT = {
    "png": (lambda: encode(PHOTO, "PNG"), PHOTO),
    "bmp": (lambda: encode(PHOTO, "BMP"), PHOTO),
    "lossless webp": (lambda: encode(PHOTO, "WEBP", lossless=True), PHOTO),
    "png with rubbish behind it": (lambda: encode(PHOTO, "PNG") + b"rubbish" * 9, PHOTO),
    "cmyk tiff": (lambda: encode(Image.fromarray(PHOTO).convert("CMYK"), "TIFF"), PHOTO),
    "cmyk jpeg": (
        lambda: encode(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "JPEG", quality=100),
        np.full_like(PHOTO, (255, 0, 0)),
    ),
    "grey": (lambda: encode(GREY, "PNG"), rgb(GREY)),
    "one bit": (lambda: encode(GREY > 127, "PNG"), rgb(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "grey of 16 bits, png": (lambda: encode(GREY.astype(np.uint16) * 257, "PNG"), rgb(GREY)),
    "grey of 16 bits, tiff": (lambda: encode(GREY.astype(np.uint16) * 257, "TIFF"), rgb(GREY)),
    "grey of 16 bits, big-endian": (
        lambda: encode(Image.frombytes("I;16B", (SIZE, SIZE), (GREY.astype(">u2") * 257).tobytes()), "TIFF"),
        rgb(GREY),
    ),
    "rgb of 16 bits": (png_of_16_bit_rgb, PHOTO),
    "grey of 32 bits, from 0 to 255": (lambda: encode(GREY.astype(np.int32), "TIFF"), rgb(GREY)),
    "grey of floats, from 0 to 255": (lambda: encode(GREY.astype(np.float32), "TIFF"), rgb(GREY)),
    "palette": (palette, PALETTE_PICTURE),
    "palette with transparency shows the colour beneath": (lambda: palette(transparency=3), PALETTE_PICTURE),
    "alpha is dropped": (lambda: encode(np.dstack([PHOTO, GREY]), "PNG"), PHOTO),
    "grey with alpha": (lambda: encode(Image.fromarray(np.dstack([GREY, OTHER[..., 0]]), "LA"), "PNG"), rgb(GREY)),
    "animated gif": (
        lambda: encode(rgb(GREY), "GIF", save_all=True, append_images=[Image.fromarray(OTHER)]),
        rgb(GREY),
    ),
    "animated webp": (
        lambda: encode(PHOTO, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(OTHER)]),
        PHOTO,
    ),
    "animated png": (lambda: encode(PHOTO, "PNG", save_all=True, append_images=[Image.fromarray(OTHER)]), PHOTO),
    "several pages of tiff": (
        lambda: encode(PHOTO, "TIFF", save_all=True, append_images=[Image.fromarray(OTHER)]),
        PHOTO,
    ),
    "one pixel": (lambda: encode(PHOTO[:1, :1], "PNG"), np.broadcast_to(PHOTO[:1, :1], PHOTO.shape)),
    "wide as a line, all of one colour": (lambda: encode(np.full((1, 500, 3), 7, np.uint8), "PNG"), PHOTO * 0 + 7),
    "high as a line, all of one colour": (lambda: encode(np.full((500, 1, 3), 7, np.uint8), "PNG"), PHOTO * 0 + 7),
    **{f"orientation {tag}": (lambda tag=tag: with_orientation(tag), picture) for tag, picture in TURNED.items()},
    "orientation 1": (lambda: with_orientation(1), PHOTO),
    "orientation 99 is none": (lambda: with_orientation(99), PHOTO),
}

# name: the file, and why it cannot be read
BROKEN = {
    "empty": (lambda: b"", "cannot identify|no image format"),
    "a text": (lambda: b"no picture at all", "cannot identify|no image format"),
    "a png's first bytes": (lambda: encode(PHOTO, "PNG")[:20], "cannot identify|no image format|Truncated|truncated"),
    "a png without pixels": (lambda: png(SIZE, 0, 8, 2, b""), "cannot identify|no image format|empty|tile"),
    "a truncated png": (lambda: encode(PHOTO, "PNG")[:-900], "truncated"),
    "a truncated jpeg": (lambda: encode(PHOTO, "JPEG")[:-300], "truncated"),
    "a truncated progressive jpeg": (lambda: encode(PHOTO, "JPEG", progressive=True)[:-300], "truncated"),
    "a truncated webp": (lambda: encode(PHOTO, "WEBP")[:-300], "identify|no image format|decod|truncated|frame"),
    "a truncated gif": (lambda: encode(PHOTO, "GIF")[:-500], "truncated"),
    "a truncated tiff": (lambda: encode(PHOTO, "TIFF")[:-900], "truncated|not enough|identify|no image format"),
    "a truncated qoi": (
        lambda: encode(PHOTO, "QOI")[:-900],
        "corrupt|index out of range|not enough image data|truncated",
    ),
    "rows that are no zlib": (
        lambda: encode(PHOTO, "PNG").replace(b"IDATx", b"IDATy", 1),
        "broken|checksum|truncated|decod|corrupt",
    ),
    "grey of 32 bits beyond 255": (
        lambda: encode(GREY.astype(np.int32) * 257, "TIFF"),
        r"mode 'I' must be from 0 to 255, but these are from \d+ to \d+: scale them",
    ),
    "grey of floats from 0 to 1": (
        lambda: encode(GREY.astype(np.float32) / 255, "TIFF"),
        "mode 'F' must be from 0 to 255, but these are from 0.* to 1: scale them",
    ),
    "grey of floats with NaN": (
        lambda: encode(np.where(GREY > 9, GREY, np.nan).astype(np.float32), "TIFF"),
        "mode 'F' must be from 0 to 255, but these are from nan to nan",
    ),
    "100,000 times as long as wide": (lambda: encode(np.zeros((100_000, 1), np.uint8), "PNG"), "too elongated"),
    "20,000 x 20,000 pixels in 50 kB": (
        lambda: png(20_000, 20_000, 1, 0, (b"\0" + bytes(2500)) * 20_000),
        r"400000000 pixels.*decompression bomb|20000 x 20000 pixels are more than the",
    ),
}


@pytest.fixture(scope="module")
def pipeline(model_folder):
    from transformers import pipeline

    return pipeline("image-captioning", model=str(model_folder))


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return CocaProcessor.from_pretrained(model_folder).tokenizer


@pytest.fixture
def through(request, tokenizer):
    """A file's path -> pixel values, by one of the doors. What a door reports as text is raised."""

    def read(path: Path, door: str) -> torch.Tensor:
        if door == "pipeline":
            return request.getfixturevalue("pipeline").preprocess(str(path))["pixel_values"]
        if door == "caption":
            (batch,) = ImageLoader(open_images(str(path)), BACKENDS["pil"])
            if batch.errors:
                raise ValueError(batch.errors[0][1])
            return batch.pixel_values
        how, backend = door.split()
        processor = CocaProcessor(BACKENDS[backend], tokenizer)
        if how == "path":
            return processor(images=str(path), text="a", return_tensors="pt")["pixel_values"]
        with Image.open(path) as image:
            return processor(images=[image], return_tensors="pt")["pixel_values"]

    return read


PATHS = ["path pil", "path torchvision", "pipeline", "caption"]
IMAGES = ["image pil", "image torchvision"]


def shown(picture: np.ndarray) -> torch.Tensor:
    return BACKENDS["pil"](Image.fromarray(np.ascontiguousarray(picture)), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("door", [*PATHS, *IMAGES])
@pytest.mark.parametrize("name", RIGHT)
def test_right_pixels(name, door, through, tmp_path):
    make, picture = RIGHT[name]
    (tmp_path / "file.png").write_bytes(make())  # the name's ending decides nothing
    if door in IMAGES and name.startswith("orientation"):
        picture = PHOTO  # a PIL image is never turned, as in open_clip
    got = through(tmp_path / "file.png", door)
    assert got.shape == (1, 3, SIZE, SIZE)
    assert torch.equal(got, shown(picture)), (got - shown(picture)).abs().max()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("door", PATHS)
@pytest.mark.parametrize("name", BROKEN)
def test_reasons(name, door, through, tmp_path):
    make, reason = BROKEN[name]
    (tmp_path / "file.png").write_bytes(make())
    with pytest.raises(ValueError, match=rf"(?i){reason}") as caught:
        through(tmp_path / "file.png", door)
    if "elongated" not in reason and door != "caption":  # which has the name beside the reason
        assert "file.png" in str(caught.value)


def opens(name: str) -> bool:
    """Whether Pillow finds the pixels bad only when it reads them, so that there is an image to pass."""
    try:
        Image.open(io.BytesIO(BROKEN[name][0]())).close()
    except (OSError, ValueError):
        return False
    return True


@pytest.mark.parametrize("door", IMAGES)
@pytest.mark.parametrize("name", [n for n in BROKEN if ("truncated" in n or "grey" in n or "rows" in n) and opens(n)])
def test_reasons_of_pil_images(name, door, through, tmp_path):
    make, reason = BROKEN[name]
    (tmp_path / "file.png").write_bytes(make())
    with pytest.raises(ValueError, match=rf"(?i)images\[0\]: .*({reason})"):
        through(tmp_path / "file.png", door)


MEMORY = """
import json, re, sys
from PIL import Image
from transformers import AutoImageProcessor
from modeling_coca import CocaImageProcessorPil
from modeling_coca.inference import ImageLoader, open_images

processor = CocaImageProcessorPil(size=32)
processor(Image.new("RGB", (32, 32)))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # `ru_maxrss` is the parent's, too
grown = {}
for path in sys.argv[1:]:
    before = peak()
    (batch,) = ImageLoader(open_images(path), processor)
    try:
        processor(path)
        refused = False
    except ValueError:
        refused = True
    grown[path.rsplit("/")[-1]] = [refused, bool(batch.errors), (peak() - before) / 1024]
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_bombs_cost_no_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(BROKEN["20,000 x 20,000 pixels in 50 kB"][0]())
    (tmp_path / "line.png").write_bytes(encode(np.zeros((1, 100_000), np.uint8), "PNG"))
    (tmp_path / "large.png").write_bytes(png(6000, 6000, 1, 0, (b"\0" + bytes(750)) * 6000))
    assert (tmp_path / "bomb.png").stat().st_size < 60_000
    paths = [str(tmp_path / f"{name}.png") for name in ("bomb", "line", "large")]
    run = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grown = json.loads(run.stdout.splitlines()[-1])
    assert grown["bomb.png"][:2] == [True, True] and grown["bomb.png"][2] < 30, grown  # MB
    assert grown["line.png"][:2] == [True, True] and grown["line.png"][2] < 30, grown
    assert grown["large.png"][:2] == [False, False] and grown["large.png"][2] > 60, grown  # it would be seen


def test_unreadable_rows_of_a_table_cost_themselves_only(tmp_path):
    names = [*list(RIGHT)[:5], *BROKEN, *list(RIGHT)[5:10]]
    for number, name in enumerate(names):
        (tmp_path / f"{number:02d}.png").write_bytes({**RIGHT, **BROKEN}[name][0]())
    (tmp_path / "list.csv").write_text("\n".join(["path", *(f"{number:02d}.png" for number in range(len(names)))]))
    batches = list(ImageLoader(open_images(tmp_path / "list.csv"), BACKENDS["pil"], batch_size=8))
    read = {int(ref.id[-6:-4]): row for batch in batches for ref, row in zip(batch.refs, _rows(batch), strict=True)}
    failed = {int(ref.id[-6:-4]) for batch in batches for ref, _ in batch.errors}
    assert failed == {number for number, name in enumerate(names) if name in BROKEN}
    for number, row in read.items():
        assert torch.equal(row[None], shown(RIGHT[names[number]][1])), names[number]


def _rows(batch):
    return [] if batch.pixel_values is None else batch.pixel_values


# ------------------------------------------------------------------------------------------------ arrays and tensors

CHW = torch.from_numpy(PHOTO.transpose(2, 0, 1).copy())
SCALED = {"do_rescale": False}
READY = {"do_rescale": False, "do_normalize": False}
NORMALISED = shown(PHOTO)[0]


def frozen() -> np.ndarray:
    array = PHOTO.copy()
    array.flags.writeable = False
    return array


# name: the input, settings; all show PHOTO, and give what its PIL image gives
SAME = {
    "uint8, channels last": (lambda: PHOTO, {}),
    "uint8, channels first": (lambda: CHW, {}),
    "uint8 tensor, channels last": (lambda: CHW.permute(1, 2, 0), {}),
    "channels named": (lambda: CHW, {"input_data_format": "channels_first"}),
    "a batch of one": (lambda: PHOTO[None], {}),
    "a list of lists": (lambda: [[PHOTO]], {}),
    "int64": (lambda: PHOTO.astype(np.int64), {}),
    "uint16 from 0 to 255": (lambda: PHOTO.astype(np.uint16), {}),
    "int16 tensor": (lambda: CHW.short(), {}),
    "read only": (frozen, {}),
    "columns first in memory": (lambda: np.asfortranarray(PHOTO), {}),
    "strides below 0": (lambda: PHOTO[::-1].copy()[::-1], {}),
    "with alpha": (lambda: np.dstack([PHOTO, np.full_like(GREY, 255)]), {}),
    "floats from 0 to 255": (lambda: PHOTO.astype(np.float32), {}),
    "float64 tensor from 0 to 255": (lambda: CHW.double(), {}),
    "float16 from 0 to 255": (lambda: PHOTO.astype(np.float16), {}),
    "bfloat16 from 0 to 255": (lambda: CHW.bfloat16(), {}),
    "a tensor with a gradient": (lambda: CHW.float().requires_grad_(), {}),
    "floats from 0 to 1": (lambda: PHOTO / 255, SCALED),
    "normalised already": (lambda: NORMALISED, READY),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAME)
def test_arrays_equal_their_picture(name, backend, monkeypatch):
    warnings = []
    monkeypatch.setattr("modeling_coca.image_processing_pil_coca.logger.warning_once", warnings.append)
    make, settings = SAME[name]
    got = BACKENDS[backend](make(), return_tensors="pt", **settings)["pixel_values"]
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, shown(PHOTO), rtol=0, atol=2e-5)
    assert warnings == []


# name: the input, settings, and the start of the warning. What comes out is what the settings say
SUSPECT = {
    "floats from 0 to 1": (lambda: PHOTO / 255, {}, "An image of floats is about to be divided by 255"),
    "normalised already": (lambda: NORMALISED, {}, "An image of floats is about to be divided by 255"),
    "floats to 65535": (lambda: PHOTO * 257.0, {}, "An image of floats is about to be divided by 255"),
    "floats from 0 to 255, not scaled": (lambda: PHOTO.astype(np.float32), SCALED, "With `do_rescale=False` an image"),
    "uint8, not scaled": (lambda: PHOTO, SCALED, "With `do_rescale=False` an image"),
    "a PIL image, not scaled": (lambda: Image.fromarray(PHOTO), SCALED, "With `do_rescale=False` an image"),
    "normalised, to be normalised": (lambda: NORMALISED, SCALED, "With `do_rescale=False` an image"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SUSPECT)
def test_values_that_do_not_fit_the_settings_are_warned_about(name, backend, monkeypatch):
    warnings = []
    monkeypatch.setattr("modeling_coca.image_processing_pil_coca.logger.warning_once", warnings.append)
    make, settings, start = SUSPECT[name]
    BACKENDS[backend](make(), return_tensors="pt", **settings)
    assert len(warnings) == 1 and warnings[0].startswith(start) and "do_normalize=False" in warnings[0]


# name: the input, settings, the exception, and what it says
REFUSED = {
    "NaN": (lambda: CHW.float() * float("nan"), {}, ValueError, "NaN or infinite"),
    "one infinite value": (lambda: np.where(PHOTO == PHOTO.max(), np.inf, PHOTO), {}, ValueError, "NaN or infinite"),
    "16 bits in an array": (lambda: GREY.astype(np.uint16) * 257, {}, ValueError, "integer values .* from 0 to 255"),
    "below 0": (lambda: PHOTO.astype(np.int16) - 128, {}, ValueError, "integer values .* from 0 to 255.* from -128"),
    "complex": (lambda: PHOTO.astype(complex), {}, TypeError, "complex128 values cannot be read .*: make it uint8"),
    "objects": (lambda: np.full((4, 4, 3), None), {}, TypeError, "object values cannot be read"),
    "strings": (lambda: PHOTO.astype(str), {}, TypeError, "values cannot be read .*: make it uint8 or float32"),
    "float8": (lambda: CHW.float().to(torch.float8_e4m3fn), {}, TypeError, "float8_e4m3fn values cannot be read"),
    "no data": (lambda: CHW.to("meta"), {}, TypeError, "meta.*make it uint8 or float32"),
    "sparse": (lambda: CHW.float().to_sparse(), {}, TypeError, "cannot be read.*make it uint8 or float32"),
    "two channels": (lambda: PHOTO[..., :2], {}, ValueError, r"\(32, 32, 2\) has no axis of 1, 3 or 4 channels"),
    "five channels": (lambda: torch.zeros(5, 9, 9), {}, ValueError, r"\(5, 9, 9\) has no axis of 1, 3 or 4 channels"),
    "one axis": (lambda: GREY[0], {}, ValueError, r"shape \(32,\) is not \[H, W\]"),
    "a number": (lambda: np.array(3), {}, ValueError, r"shape \(\) is not \[H, W\]"),
    "five axes": (lambda: PHOTO[None, None], {}, ValueError, r"shape \(1, 1, 32, 32, 3\) is not"),
    "no rows": (lambda: PHOTO[:0], {}, ValueError, r"shape \(0, 32, 3\) is not .* with pixels in it"),
    "no images": (lambda: CHW[None, :0][:0], {}, ValueError, "images is empty: pass at least one"),
    "channels named wrong": (lambda: PHOTO, {"input_data_format": "channels_first"}, ValueError, "makes 32 channels"),
    "channels named oddly": (lambda: PHOTO, {"input_data_format": "hwc"}, ValueError, "'channels_first' or 'channels_"),
    "closed": (lambda: closed(), {}, ValueError, "closed image"),
    "bytes": (lambda: encode(PHOTO, "PNG"), {}, TypeError, r"not bytes: open it by `PIL.Image.open\(io.BytesIO"),
    "a dict": (lambda: {"image": PHOTO}, {}, TypeError, "expected a PIL image.* not dict"),
    "a folder": (lambda: str(Path(__file__).parent), {}, ValueError, "cannot be loaded.*must be a path"),
    "a text": (lambda: "a photo of a cat", {}, ValueError, "'a photo of a cat' cannot be loaded.*`text=`"),
    "a device": (lambda: "/dev/zero", {}, ValueError, "'/dev/zero' cannot be loaded"),
    "a NUL in a path": (lambda: "a\0b.png", {}, ValueError, "cannot be loaded"),
    "base64 of no image": (lambda: "data:image/png;base64,AAAA", {}, ValueError, "cannot be loaded"),
    "sizes that do not stack": (
        lambda: [PHOTO, PHOTO[:, :16]],
        {"do_center_crop": False, "return_tensors": "pt"},
        ValueError,
        "Unable to convert output 'pixel_values'",
    ),
    "two means": (lambda: PHOTO, {"image_mean": [0.5, 0.5]}, ValueError, "image_mean=.*each of the 3 channels"),
    "a deviation of 0": (lambda: PHOTO, {"image_std": [0.5, 0.0, 0.5]}, ValueError, "image_std=.*must be positive"),
    "no such filter": (lambda: PHOTO, {"resample": 77}, ValueError, "resample=77 is none of PIL's filters"),
}


def closed() -> Image.Image:
    image = Image.fromarray(PHOTO)
    image.close()
    return image


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused(name, backend):
    make, settings, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        BACKENDS[backend](make(), **settings)
