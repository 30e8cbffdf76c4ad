"""A converted model beside its source, rebuilt with the source's own library: real pictures, captions, every output."""

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from ..configuration_coca import CocaConfig
from ..modeling_coca import CocaForConditionalGeneration, CocaModel
from .convert import Found, build_image_processor, build_processor

TEXTS = ["a photo of a cat", "an astronaut in front of a flag and a model of the space shuttle", "Coffee!"]
_NEW_TOKENS = 20


class Difference(NamedTuple):
    """
    Args:
        what: Was compared.
        largest: Difference between two of its values.
        allowed: More means that something is wrong.
        note: In words.
    """

    what: str
    largest: float
    allowed: float
    note: str = ""

    @property
    def is_fine(self) -> bool:
        return self.largest <= self.allowed


class Original(NamedTuple):
    """The source's own model.

    Args:
        embed: Images and ids (B, T), padded to the full length, to normalised embeddings.
        logits: Images and ids (B, T) to logits (B, T or more, vocabulary); `None` without a decoder.
        pixels: Its own preparation of images, or `None`.
        tokenize: Its own tokenizer, or `None`.
    """

    embed: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    pixels: Callable[[list[Image.Image]], torch.Tensor] | None = None
    tokenize: Callable[[list[str]], torch.Tensor] | None = None


def _open_clip(found: Found, state_dict: Mapping[str, torch.Tensor]) -> Original:
    from open_clip.coca_model import CoCa
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2

    their_config = {key: value for key, value in found.their_config.items() if key != "custom_text"}
    model = _load(CoCa(**their_config), state_dict)
    text = found.config.text_config
    size = found.config.vision_config.image_size
    settings = {key: value for key, value in found.preprocess_cfg.items() if key != "size"}
    transform = image_transform_v2(PreprocessCfg(size=size, **settings), is_train=False)
    images: dict[int, torch.Tensor] = {}

    def embed(pixels, ids):
        return model.encode_image(pixels).flatten(1), model.encode_text(ids)

    def logits(pixels, ids):
        if id(pixels) not in images:  # greedy decoding asks for the same ones again and again
            images[id(pixels)] = model._encode_image(pixels)[1]
        return model.text_decoder(images[id(pixels)], model._encode_text(ids)[1])

    tokenizer = SimpleTokenizer(context_length=text.max_text_length) if text.vocab_size == 49408 else None
    pixels = lambda pictures: torch.stack([transform(picture) for picture in pictures])  # noqa: E731
    return Original(embed, logits, pixels, tokenizer)


def _conch(found: Found, state_dict: Mapping[str, torch.Tensor]) -> Original:
    from conch.open_clip_custom.coca_model import CoCa
    from conch.open_clip_custom.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from conch.open_clip_custom.transform import image_transform

    their_config = {key: value for key, value in found.their_config.items() if key != "custom_text"}
    if not found.conversion.has_decoder:
        their_config["multimodal_cfg"] = {**their_config["multimodal_cfg"], "layers": 0}
    model = _load(CoCa(**their_config), state_dict)
    transform = image_transform(found.config.vision_config.image_size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    room = lambda ids: F.pad(ids, (0, 1))  # noqa: E731  # CONCH overwrites the last id with [CLS]

    def embed(pixels, ids):
        return model.encode_image(pixels), model.encode_text(room(ids))

    def logits(pixels, ids):
        return model(pixels, room(ids))["logits"]

    pixels = lambda pictures: torch.stack([transform(picture) for picture in pictures])  # noqa: E731
    return Original(embed, logits if found.conversion.has_decoder else None, pixels)


def _torchmultimodal(found: Found, state_dict: Mapping[str, torch.Tensor]) -> Original:
    from torchmultimodal.models.coca.coca_model import coca_vit

    state_dict = {name: tensor for name, tensor in state_dict.items() if name != "logit_scale"}
    model = _load(coca_vit(**found.their_config), state_dict)
    length, pad = found.config.text_config.max_text_length, found.config.text_config.pad_token_id

    def run(pixels, ids):
        return model(pixels, F.pad(ids, (0, length - ids.shape[1]), value=pad))  # takes the full length alone

    def embed(pixels, ids):
        outputs = run(pixels, ids)
        return outputs.image_pooled_output.flatten(1), outputs.text_pooled_output

    return Original(embed, lambda pixels, ids: run(pixels, ids).multimodal_embeddings[:, : ids.shape[1]])


_ORIGINALS = {"open_clip": _open_clip, "CONCH": _conch, "torchmultimodal": _torchmultimodal}


def _load(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state_dict = {
        name: tensor.reshape(shapes[name]) if tensor.numel() == 1 and name in shapes else tensor
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(state_dict)
    return model.eval()


def rebuild(found: Found) -> Original:
    """The source's own model, in float32.

    Raises:
        ImportError: Its library is not installed. The message names it.
    """
    weights = found.checkpoint.weights
    state_dict = {found.family.rename(name): weights[name].float() for name in weights}
    try:
        return _ORIGINALS[found.family.name](found, state_dict)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"`--check` rebuilds the source with its own library, and {error.name} is missing: install {found.family.package} "
            "(for CONCH and torchmultimodal from their repositories), or convert without `--check`."
        ) from error


def pictures(folder: Path | None = None) -> list[Image.Image]:
    """Photographs: those of `folder`, or three that come with the package (an astronaut, a cat, a cup of coffee)."""
    if folder is None:
        files = sorted((resources.files(__package__) / "pictures").iterdir(), key=lambda file: file.name)
    else:
        files = [folder] if folder.is_file() else sorted(folder.iterdir())
    images = []
    for file in files:
        if file.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")):
            with file.open("rb") as opened, Image.open(opened) as image:
                image.load()
                images.append(image)
    if not images:
        raise FileNotFoundError(f"{folder} holds no pictures.")
    return images[:16]


@torch.inference_mode()
def check(found: Found, folder: Path, images: Path | None = None) -> list[Difference]:
    """Compares a converted model with its source.

    Args:
        found: The source.
        folder: What was written.
        images: A folder of pictures; by default see `pictures`.

    Returns:
        The largest difference of pixels, token ids, embeddings, logits and greedily decoded tokens, as far as the source has
        them.
    """
    original = rebuild(found)
    config, text = found.config, found.config.text_config
    images = pictures(images)
    pixels = build_image_processor(config, found.preprocess_cfg)(images, return_tensors="pt")["pixel_values"]
    differences = []
    their_pixels = pixels if original.pixels is None else original.pixels(images)
    if original.pixels is not None:
        # One 8-bit step: torchvision's resizing rounds otherwise than Pillow's
        differences.append(Difference("pixels", _largest(pixels, their_pixels), 0.0153, f"{len(images)} pictures"))

    ids, note = _ids(found, len(images)), "random ids"
    processor, _ = build_processor(found)
    if hasattr(processor, "tokenizer"):
        ids = processor.tokenizer(
            TEXTS, padding="max_length", max_length=text.max_text_length, truncation=True, return_tensors="pt"
        )["input_ids"]
        note = "captions"
        if original.tokenize is not None:
            differences.append(Difference("token ids", float((ids != original.tokenize(TEXTS)).sum()), 0, "captions"))

    model_class = CocaForConditionalGeneration if found.conversion.has_decoder else CocaModel
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    written = CocaConfig.from_pretrained(folder).dtype
    encoder = model.model if found.conversion.has_decoder else model
    image_embeds, text_embeds = original.embed(their_pixels, ids)
    ours = F.normalize(encoder.get_image_features(their_pixels).pooler_output, dim=-1)
    # Weights that were written in fewer bits than the source's cannot agree to the last
    factor = 1 if written == found.dtype else 300
    differences.append(
        Difference("image embeddings", _largest(ours, image_embeds), 1e-4 * factor, f"{len(images)} pictures")
    )
    ours = F.normalize(encoder.get_text_features(ids).pooler_output, dim=-1)
    differences.append(Difference("text embeddings", _largest(ours, text_embeds), 1e-4 * factor, note))
    if (
        original.logits is None or not text.use_cls_token
    ):  # without [CLS] open_clip takes texts of the full length alone
        return differences

    pairs = min(len(images), len(ids))
    batch = their_pixels[:pairs]
    expected = original.logits(batch, ids[:pairs])
    ours = model(input_ids=ids[:pairs], pixel_values=batch).logits[:, : expected.shape[1]]
    real = _before_padding(ids[:pairs], text.pad_token_id)[:, : expected.shape[1]]
    scale = max(1.0, expected[real].abs().max().item())
    differences.append(
        Difference("logits", _largest(ours[real], expected[real]), 1e-4 * factor * scale, f"largest {scale:.1f}")
    )

    length = min(1 + _NEW_TOKENS, text.max_text_length)
    expected = _greedy(original.logits, batch, text, length)
    ours = model.generate(batch, do_sample=False, num_beams=1, min_length=0, max_length=length, top_p=None, top_k=None)
    ours = F.pad(ours, (0, length - ours.shape[1]), value=text.pad_token_id or 0)
    eos = text.eos_token_id if isinstance(text.eos_token_id, int) else text.eos_token_id[0]
    keep = (expected == eos).cumsum(-1) - (expected == eos).long() == 0  # up to the first EOS
    wrong = ((ours != expected) & keep).sum().item()
    captions = f"{int(keep.sum())} tokens"
    differences.append(Difference("greedy tokens", float(wrong), 0 if factor == 1 else float("inf"), captions))
    return differences


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _ids(found: Found, rows: int) -> torch.Tensor:
    """Texts of random ids, as long as there is room, less and less."""
    text = found.config.text_config
    length = text.max_text_length
    ids = torch.randint(1, max(2, text.vocab_size - 2), (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = text.bos_token_id
    for row in range(rows):
        end = max(2, length - 1 - 2 * row)
        ids[row, end - 1] = text.eos_token_id
        ids[row, end:] = text.pad_token_id or 0
    return ids


def _before_padding(ids: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    return (ids != pad_token_id).flip(-1).cumsum(-1).flip(-1) > 0


def _greedy(logits: Callable, pixels: torch.Tensor, text, length: int) -> torch.Tensor:
    ids = torch.full((len(pixels), 1), text.bos_token_id)
    while ids.shape[1] < length:
        ids = torch.cat([ids, logits(pixels, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids
