import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import modeling_coca  # noqa: F401  (registers the Auto classes)
from modeling_coca.image_processing_pil_coca import CocaImageProcessorPil, crop_box, resized_size

pytest.importorskip("torchvision")
from modeling_coca.image_processing_coca import CocaImageProcessor

BACKENDS = [CocaImageProcessorPil, CocaImageProcessor]
MODES = ["RGB", "L", "RGBA", "LA", "CMYK", "P", "1", "I", "F", "YCbCr"]
ONE_STEP = 1 / 255 / 0.26130258 + 1e-5  # of 8 bits, in normalised units: 0.0150


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image in which one pixel of displacement, or another filter, is seen at once."""
    rng = np.random.default_rng(width * 10_007 + height)
    if mode == "I":
        return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.int32))
    if mode == "F":
        return Image.fromarray(rng.uniform(0, 255, (height, width)).astype(np.float32))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    return image if mode == "RGBA" else image.convert("LA") if mode == "LA" else image.convert("RGB").convert(mode)


def photo(width: int, height: int) -> np.ndarray:
    """Smooth, as photographs are: `[H, W, 3]`."""
    small = np.random.default_rng(0).integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def error(processor, image, reference) -> float:
    """Largest difference to open_clip's transform."""
    ours = processor(image, return_tensors="pt")["pixel_values"]
    assert ours.dtype == torch.float32 and ours.shape[0] == 1
    return (ours[0] - reference(image)).abs().max().item()


@pytest.fixture(scope="module")
def image_transform():
    return pytest.importorskip("open_clip").transform.image_transform


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_width_equals_open_clip(backend, image_transform):
    processor, reference = backend(), image_transform(224, is_train=False)
    sizes = [(width, 224) for width in range(224, 301)] + [(224, height) for height in range(224, 301, 3)]
    assert max(error(processor, noise(*size), reference) for size in sizes) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_open_clip(backend, mode, image_transform):
    processor, reference = backend(size=96), image_transform(96, is_train=False)
    sizes = [(271, 183), (99, 96), (96, 131), (50, 40), (13, 300), (300, 13), (1, 1)]
    assert max(error(processor, noise(*size, mode), reference) for size in sizes) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_palettes_with_transparency_equal_open_clip(backend, image_transform):
    image = noise(140, 90, "P")
    image.info["transparency"] = 3
    assert error(backend(size=96), image, image_transform(96, is_train=False)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "config",
    [
        {"size": 72, "resize_mode": "longest"},
        {"size": 72, "resize_mode": "longest", "fill_color": 128},
        {"size": 72, "resize_mode": "squash"},
        {"size": 72, "interpolation": "bilinear"},
        {"size": 72, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "random"},
        {"size": [64, 96]},
        {"size": [96, 64], "interpolation": "bilinear"},
        {"size": [64, 96], "resize_mode": "squash", "interpolation": "bilinear"},
        {"size": [64, 96], "resize_mode": "longest"},
    ],
    ids=str,
)
def test_open_clips_settings(backend, config, image_transform):
    processor = backend.from_open_clip({"mode": "RGB", **config})
    settings = dict(config)
    reference = image_transform(settings.pop("size"), is_train=False, **settings)
    for size in [(131, 93), (93, 131), (75, 72), (50, 40), (300, 13), (96, 64)]:
        for mode in ("RGB", "P", "RGBA", "L", "CMYK"):
            assert error(processor, noise(*size, mode), reference) == 0, (size, mode)


@pytest.mark.parametrize(
    ("length", "target", "box"),
    [(224, 224, (0, 0, 0)), (225, 224, (0, 0, 0)), (227, 224, (0, 0, 2)), (229, 224, (0, 0, 2)), (5, 8, (1, 2, 0))],
)
def test_the_crop_halves_odd_margins_to_the_even_side(length, target, box):
    assert crop_box(length, target) == box


def test_output_sizes():
    square, oblong = CocaImageProcessorPil(size=224).size, CocaImageProcessorPil(size=(64, 96)).size
    assert resized_size(427, 640, square, "shortest") == (224, 335)
    assert resized_size(640, 427, square, "longest") == (224, 149)
    assert resized_size(427, 640, square, "squash") == (224, 224)
    assert resized_size(427, 640, oblong, "shortest") == (64, 96)
    assert resized_size(2, 3000, square, "longest") == (1, 224)
    for backend in BACKENDS:
        for given, shape in [
            ({}, (224, 224)),
            ({"size": 288}, (288, 288)),
            ({"size": {"shortest_edge": 96}}, (96, 96)),
            ({"size": {"height": 64, "width": 96}}, (64, 96)),
            ({"size": 80, "crop_size": 64}, (64, 64)),
            ({"size": 80, "crop_size": {"height": 64, "width": 100}}, (64, 100)),
            ({"size": 80, "do_center_crop": False}, (80, 120)),
            ({"do_resize": False, "do_center_crop": False}, (100, 150)),
        ]:
            pixels = backend(**given)(noise(150, 100), return_tensors="pt")["pixel_values"]
            assert pixels.shape == (1, 3, *shape), given
        assert backend(size=64)(noise(150, 100), size=48, return_tensors="np")["pixel_values"].shape == (1, 3, 48, 48)
        kept = backend(size=80, crop_size=64)(noise(150, 100), size=72, return_tensors="np")["pixel_values"]
        assert kept.shape == (1, 3, 64, 64)


def test_tensors_are_one_step_away_from_open_clip(image_transform):
    array, reference = photo(640, 427), image_transform(224, is_train=False)
    want = reference(Image.fromarray(array))
    for image in (torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1), array):
        got = CocaImageProcessor()(image, return_tensors="pt", device="cpu")["pixel_values"][0]
        assert (got - want).abs().max() <= ONE_STEP
        exact = CocaImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(exact, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_floats_are_neither_rounded_nor_clipped(backend, image_transform):
    array = photo(640, 427)
    reference = image_transform(224, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)(Image.fromarray(array))
    scaled = torch.from_numpy(array).permute(2, 0, 1) / 255
    got = backend()(scaled, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert got.min() < 0  # bicubic overshoots at edges; 8 bits end at 0 and 255
    # PIL rounds after each of its two passes, by half a step, and a bicubic pass passes errors on 1.25 times at most.
    assert (got.clamp(0, 1) - reference).abs().max() <= (0.5 * 1.25 + 0.5) / 255
    assert not torch.equal((got * 255).round(), got * 255)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_kinds_of_input_agree(backend, tmp_path):
    array = photo(96, 72)
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    processor = backend(size=48)
    want = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    chw = array.transpose(2, 0, 1)
    rgba = np.concatenate([array, np.full_like(array[..., :1], 255)], axis=-1)
    same = [array, chw, chw.astype(np.int64), chw.astype(np.uint16), torch.tensor(chw), torch.tensor(chw).long(), rgba]
    same += [chw.astype(np.float32), torch.tensor(chw).float(), torch.tensor(array).double(), rgba.astype(np.float64)]
    same += [str(path), path, [array], [[array]], (array,), array[None], torch.tensor(chw)[None], array[::-1][::-1]]
    for image in same:
        got = processor(image, return_tensors="pt")["pixel_values"]
        assert got.shape == (1, 3, 48, 48) and got.dtype == torch.float32
        assert (got - want).abs().max() <= ONE_STEP
    half = processor(torch.tensor(chw).to(torch.bfloat16), return_tensors="pt")["pixel_values"]
    assert (half - want).abs().max() <= 3 * ONE_STEP
    grey = np.array(Image.fromarray(array).convert("L"))
    want = processor(Image.fromarray(grey), return_tensors="pt")["pixel_values"]
    for image in (grey, grey[None], grey[..., None], torch.tensor(grey)):
        got = processor(image, return_tensors="pt")["pixel_values"]
        assert got.shape == (1, 3, 48, 48) and (got - want).abs().max() <= ONE_STEP
    mask = processor(grey > 127, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert mask.min() == 0 and mask.max() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_different_sizes_and_modes(backend):
    images = [noise(70, 50), noise(50, 70, "L"), np.array(noise(64, 64)), noise(99, 33, "P")]
    processor = backend(size=48)
    batch = processor(images, return_tensors="pt")["pixel_values"]
    single = [processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
    assert batch.shape == (4, 3, 48, 48) and torch.equal(batch, torch.stack(single))
    as_list = processor(images)["pixel_values"]
    assert len(as_list) == 4 and as_list[0].shape == (3, 48, 48)
    uncropped = processor(images[:2], do_center_crop=False)["pixel_values"]
    assert [tuple(image.shape) for image in uncropped] == [(3, 48, 67), (3, 67, 48)]
    raw = processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert raw.min() >= 0 and raw.max() > 200
    assert torch.equal(raw, raw.round())


@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_left_to_the_caller(backend, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    Image.fromarray(photo(96, 48)).save(file, "JPEG", exif=exif)
    image = Image.open(file)
    processor = backend(size=48, do_center_crop=False)
    assert processor(image)["pixel_values"][0].shape == (3, 48, 96)
    (tmp_path / "image.jpg").write_bytes(file.getvalue())  # transformers' loader turns files upright
    assert processor(str(tmp_path / "image.jpg"))["pixel_values"][0].shape == (3, 96, 48)


def truncated() -> Image.Image:
    file = io.BytesIO()
    noise(100, 100).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:-2000]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (truncated, ValueError, r"images\[1\]: the file is corrupt or truncated"),
        (lambda: None, TypeError, r"images\[1\]: expected a PIL image.*not NoneType"),
        (lambda: 3, TypeError, r"images\[1\]: .*not int"),
        (lambda: b"\x89PNG", TypeError, r"images\[1\]: .*not bytes: open it by `PIL.Image.open\(io.BytesIO"),
        (lambda: "no such file", ValueError, r"'no such file' cannot be loaded.*`text=`"),
        (lambda: Image.new("RGB", (0, 5)), ValueError, r"images\[1\]: the image is empty \(0 x 5 pixels\)"),
        (lambda: np.zeros((0, 5, 3), np.uint8), ValueError, r"images\[1\]: the shape \(0, 5, 3\)"),
        (lambda: np.zeros((5,), np.uint8), ValueError, r"images\[1\]: the shape \(5,\)"),
        (lambda: np.zeros((5, 9, 9), np.uint8), ValueError, r"images\[1\]: the shape \(5, 9, 9\) has no axis of"),
        (lambda: torch.full((3, 9, 9), float("nan")), ValueError, r"images\[1\]: .*NaN or infinite"),
        (lambda: np.full((9, 9, 3), np.inf), ValueError, r"images\[1\]: .*NaN or infinite"),
        (lambda: np.full((9, 9, 3), 300), ValueError, r"images\[1\]: .*from 0 to 255.*from 300 to 300"),
        (lambda: Image.new("L", (30_000, 1)), ValueError, r"images\[1\]: .*30000 x 1 pixels is too elongated"),
    ],
)
def test_bad_images_are_named(backend, bad, kind, message):
    with pytest.raises(kind, match=message):
        backend()([noise(30, 30), bad()], return_tensors="pt")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_settings_are_named(backend):
    for given, message in [
        ({"size": {"longest_edge": 9}}, "size=.*must hold 'shortest_edge' or 'height' and 'width'"),
        ({"size": 0}, "size=.*positive"),
        ({"crop_size": {"shortest_edge": 9}}, "crop_size=.*must hold 'height' and 'width'"),
        ({"resize_mode": "crop"}, "resize_mode='crop' is not one of shortest, longest, squash"),
        ({"fill_color": 300}, "fill_color=300 must be from 0 to 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend(**given)
    with pytest.raises(ValueError, match="images is empty"):
        backend()([])
    with pytest.raises(ValueError, match="resize_mode"):
        backend()(noise(9, 9), resize_mode="crop")


def test_floats_that_are_scaled_already_are_warned_about(monkeypatch):
    warnings = []
    monkeypatch.setattr("modeling_coca.image_processing_pil_coca.logger.warning_once", warnings.append)
    image = np.full((9, 9, 3), 0.5)
    CocaImageProcessorPil()(image, do_rescale=False)
    assert warnings == []
    CocaImageProcessorPil()(image)
    assert "do_rescale=False" in warnings[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_settings_load_in_either_backend(backend, tmp_path):
    processor = backend.from_open_clip({"size": [64, 96], "resize_mode": "longest", "fill_color": 7, "mean": 0.5})
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "CocaImageProcessor"
    assert saved["size"] == saved["crop_size"] == {"height": 64, "width": 96}
    want = processor(noise(50, 40), return_tensors="pt")["pixel_values"]
    for name, other in (("pil", CocaImageProcessorPil), ("torchvision", CocaImageProcessor)):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
        assert type(loaded) is other
        assert torch.equal(loaded(noise(50, 40), return_tensors="pt")["pixel_values"], want)
        assert loaded.image_mean == (0.5, 0.5, 0.5)
        assert loaded(noise(50, 40), size=32, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
