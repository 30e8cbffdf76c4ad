"""From a checkpoint to a folder that `from_pretrained` opens, and back to one that open_clip opens.

No more than a few tensors are in memory at a time: they are read, converted and written one after the other. A folder is
written under a temporary name and renamed at the end, so that there is no half of one.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import _TYPES as SAFETENSORS_TYPES
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available, logging

from ..configuration_coca import CocaConfig
from ..modeling_coca import CocaForConditionalGeneration, CocaModel
from ..processing_coca import CocaProcessor
from ..saving import new_folder
from ..tokenization_coca import CocaTokenizer
from . import card
from .families import OwnLayoutError, detect
from .family import Conversion, Family
from .open_clip import Export
from .recipes import Recipe, find_recipe
from .sources import RELEASE_AFTER, Checkpoint, Weights, find, read_json, tokenizer_files

logger = logging.get_logger(__name__)

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
_CLIP_VOCAB_SIZE = 49408
_CONCH_VOCAB_SIZE = 32007


class Found(NamedTuple):
    """A checkpoint, recognised and matched with a config.

    Args:
        checkpoint: Where it lies.
        family: Whose it is.
        conversion: Its tensors and ours.
        preprocess_cfg: open_clip's settings of the images, as far as they are given.
        config_origin: Where the config comes from, in words.
        dtype: The widest of its floating-point types.
        recipe: What is known of it, if it is a public one.
        warnings: What a user should know.
    """

    checkpoint: Checkpoint
    family: Family
    conversion: Conversion
    preprocess_cfg: dict[str, Any]
    config_origin: str
    dtype: torch.dtype
    recipe: Recipe | None
    warnings: list[str]

    @property
    def config(self) -> CocaConfig:
        return self.conversion.config

    @property
    def their_config(self) -> dict:
        return self.conversion.their_config

    def load(self, dtype: torch.dtype | None = None) -> CocaForConditionalGeneration | CocaModel:
        """The model, in memory."""
        model = self.conversion.load(self.checkpoint.weights, dtype or self.dtype)
        self.checkpoint.weights.release()
        return model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Of the model, in the source's dtype."""
        state_dict = self.conversion.state_dict(self.checkpoint.weights, self.dtype)
        self.checkpoint.weights.release()
        return state_dict

    def generation_config(self) -> GenerationConfig:
        """Ids, and for public checkpoints the settings with which their makers write captions."""
        text = self.config.text_config
        settings = {} if self.recipe is None else dict(self.recipe.generation)
        if settings.get("max_length", 0) > text.max_text_length:
            settings["max_length"] = text.max_text_length
        return GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, **settings
        )

    def describe(self) -> list[tuple[str, str]]:
        """What was found, as pairs of a word and a phrase."""
        vision, text, config = self.config.vision_config, self.config.text_config, self.config
        weights = self.checkpoint.weights
        parameters = sum(tensor.numel() for tensor in self.conversion.parameters.values())
        files = ", ".join(path.name for path in weights.paths)
        quirks = [
            "[CLS] sees one padding token (`shifted_cls_mask`)" if text.shifted_cls_mask else "",
            "" if text.use_cls_token else "text embedding read at EOS",
            "one MLP in a multimodal layer" if text.multimodal_layer_type == "one_mlp" else "",
            "" if self.conversion.has_decoder else "no decoder: a dual encoder comes out",
        ]
        unimodal = text.num_unimodal_layers
        decoder = f" + {text.num_multimodal_layers}" if self.conversion.has_decoder else ""
        lines = [
            ("family", self.family.title),
            (
                "weights",
                f"{files}: {len(weights)} tensors, {parameters / 1e6:.2f} M parameters, "
                f"{str(self.dtype).removeprefix('torch.')}, {weights.num_bytes / 1e9:.2f} GB",
            ),
            ("config", self.config_origin),
            (
                "image",
                f"{_by(vision.image_size)} pixels in patches of {vision.patch_size}, {vision.num_hidden_layers} layers of width "
                f"{vision.hidden_size}, {vision.num_attention_heads} heads",
            ),
            ("pooler", card.pooler(config)),
            (
                "text",
                f"{text.max_text_length} tokens of {text.vocab_size:,}, {unimodal}{decoder} layers of width {text.hidden_size}, "
                f"{text.num_attention_heads} heads",
            ),
            ("embedding", f"{config.projection_dim} channels"),
            ("quirks", "; ".join(filter(None, quirks)) or "none"),
        ]
        if self.recipe is not None:
            lines.append(
                ("known as", f"{self.recipe.title}, licence {self.recipe.license_name or self.recipe.license}")
            )
        return lines


def _by(size: int | list[int]) -> str:
    return f"{size} x {size}" if isinstance(size, int) else " x ".join(map(str, size))


def open_checkpoint(
    source: str | Path, config: str | Path | dict | None = None, revision: str | None = None, **hub_kwargs
) -> Found:
    """Finds, recognises and checks a checkpoint. No tensor is read.

    Args:
        source: A folder, a weight file, or a repository of the Hub: open_clip's, CONCH's or torchmultimodal's.
        config: The arguments with which its library builds the model, or a JSON file of them. By default those beside the
            weights, else what the tensors tell.
        revision: Branch, tag or commit, of a repository.
        hub_kwargs: See `find`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no CoCa that can be converted, or its tensors do not fit its config. The message lists them.

    Example:

    ```python
    >>> from modeling_coca.conversion import open_checkpoint

    >>> found = open_checkpoint("laion/CoCa-ViT-L-14-laion2B-s13B-b90k")  # doctest: +SKIP
    >>> model = found.load()  # doctest: +SKIP
    ```
    """
    checkpoint = find(source, revision, **hub_kwargs)
    weights = checkpoint.weights
    if (checkpoint.config or {}).get("model_type") == "coca":
        raise OwnLayoutError(
            f"{source} is a CoCa in this package's own layout already: open it with `from_pretrained`."
        )
    family = detect(weights)
    if config is None:
        given, origin = checkpoint.config, checkpoint.config_path and checkpoint.config_path.name
    else:
        given, origin = (config, "as given") if isinstance(config, dict) else (read_json(Path(config)), str(config))
    their_config, preprocess_cfg = _split(given, family)
    if their_config is None and (config is not None or origin == "open_clip_config.json"):
        raise ValueError(
            f"{origin} is no config of {family.name}: its keys are {sorted(given)[:12]}. Give the right one with `--config`, or "
            "take the file away, so that the sizes are read off the tensors."
        )
    warnings = []
    if their_config is None:
        try:
            their_config = family.infer_config({family.rename(name): shape for name, shape in weights.shapes.items()})
        except KeyError as error:
            raise ValueError(
                f"There is no config beside {checkpoint.name}, and the tensors do not tell it: {error} is missing. Give the "
                "config of its library with `--config`."
            ) from error
        origin = f"none there; read off the tensors (taken for granted: {family.assumed})"
    conversion = Conversion(family, their_config, weights.shapes)
    dtype = _widest(weights.dtypes.values())
    names = (checkpoint.repository, Path(source).name, checkpoint.folder.name, checkpoint.folder.resolve().name)
    recipe = find_recipe(*names, *(path.name for path in weights.paths), "conch" if family.name == "CONCH" else None)
    if recipe is not None and recipe.warning:
        warnings.append(recipe.warning)
    unfilled = [match.entry.theirs for match in conversion.matches if match.source is None]
    if "logit_scale" in unfilled:
        warnings.append(
            "The checkpoint has no temperature: the initial one stands in its place. It changes probabilities, no ranking."
        )
    different = {dtype for dtype in weights.dtypes.values() if dtype.is_floating_point}
    if len(different) > 1:
        warnings.append(
            f"The tensors are of {len(different)} types; all are written as the widest, {dtype}, which loses nothing."
        )
    return Found(checkpoint, family, conversion, preprocess_cfg, origin, dtype, recipe, warnings)


_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def open_foreign(source: str | Path, error: OSError, kwargs: dict[str, Any]) -> Found:
    """`open_checkpoint` for `from_pretrained`, where transformers found nothing.

    Args:
        source: As given.
        error: What transformers said; raised where there is nothing of another library's either.
        kwargs: Of `from_pretrained`. Those of the Hub and fields of the config are taken out.
    """
    hub_kwargs = {key: value for key in _HUB_KWARGS if (value := kwargs.pop(key, None)) is not None}
    try:
        found = open_checkpoint(source, **hub_kwargs)
    except (FileNotFoundError, OwnLayoutError):
        raise error from None
    found.config.dtype = found.dtype
    for key in [key for key in kwargs if hasattr(found.config, key) and key not in ("dtype", "torch_dtype")]:
        setattr(found.config, key, kwargs.pop(key))
    for warning in found.warnings:
        logger.warning(warning)
    logger.info(f"{source} was converted in memory; `coca convert {source} OUT` does it once for all.")
    return found


def _split(given: dict | None, family: Family) -> tuple[dict | None, dict]:
    """A JSON's arguments of the model and open_clip's settings of the images; `None` if it is no config of the family."""
    if given is None:
        return None, {}
    their_config = given.get("model_cfg", given)
    key = "vision_patch_size" if family.name == "torchmultimodal" else "vision_cfg"
    if not isinstance(their_config, dict) or key not in their_config:
        return None, {}
    return their_config, given.get("preprocess_cfg") or {}


def _widest(dtypes) -> torch.dtype:
    widest = torch.float16
    floats = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floats) == 1:
        return floats.pop()
    for dtype in floats:
        widest = torch.promote_types(widest, dtype)
    return widest


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def convert(
    source: str | Path,
    out: str | Path,
    config: str | Path | dict | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
    report: Callable[[Found], None] = lambda found: None,
    check: Callable[[Found, Path], None] | None = None,
) -> Found:
    """Converts a checkpoint to a folder with model, processor, tokenizer, generation config and card.

    Memory: a few tensors at a time, whatever the size.

    Args:
        source, config, revision: See `open_checkpoint`.
        out: The folder to write.
        tokenizer: A folder with a tokenizer, a `tokenizer.json` or a `bpe_simple_vocab_16e6.txt.gz`. By default CLIP's, from
            the installed open_clip, for vocabularies of its size.
        dtype: Of the weights, by default the source's.
        max_shard_size: Of a weight file.
        overwrite: Replace `out` if it holds a model.
        command: What the card says was run.
        report: Called with what was found before anything is written.
        check: Called with what was found and the folder written, under its temporary name; may raise (see `checking.check`).

    Returns:
        What was found.

    Raises:
        FileExistsError: `out` is there, and may not be overwritten.
        ValueError, FileNotFoundError: See `open_checkpoint`. Nothing is written then.
    """
    out = Path(out)
    check_out(out, overwrite)
    found = open_checkpoint(source, config, revision)
    processor, notes = build_processor(found, tokenizer)
    found.warnings.extend(notes)
    report(found)
    dtype = dtype or found.dtype
    with new_folder(out) as folder:
        write_weights(found, folder, dtype, max_shard_size)
        model_config = found.config
        model_config.architectures = [type(found.conversion.model).__name__]
        model_config.dtype = dtype
        model_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if found.conversion.has_decoder:
            found.generation_config().save_pretrained(folder)
        (folder / "README.md").write_text(card.render(found, out, command), encoding="utf-8")
        if check is not None:
            check(found, folder)
    return found


def check_out(out: Path, overwrite: bool):
    """Refuses a folder that holds something, before work is done."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_model = out.is_dir() and any((out / name).is_file() for name in ("config.json", "open_clip_config.json"))
    if not overwrite or not is_model:
        advice = "name another folder, or pass `--overwrite`" if is_model else "name another folder: it holds no model"
        raise FileExistsError(f"{out} exists: {advice}.")


def write_weights(found: Found, folder: Path, dtype: torch.dtype, max_shard_size: str | int):
    """Writes `model.safetensors`, or shards of it with their index."""
    conversion, weights = found.conversion, found.checkpoint.weights
    makers, shapes = {}, {}
    for match in conversion.matches:
        for part, name in enumerate(match.entry.ours):
            name = name.removeprefix(conversion.prefix)
            makers[name] = (match, part)
            shapes[name] = tuple(conversion.parameters[match.entry.ours[part]].shape)

    def make(name: str) -> torch.Tensor:
        match, part = makers[name]
        return list(conversion.tensors(weights, [match]))[part][1].to(dtype)

    meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    total = sum(tensor.numel() * tensor.itemsize for tensor in meta.values())
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="converting") as progress:
        for file, names in split.filename_to_tensors.items():
            tensors = {name: (dtype, shapes[name]) for name in names}
            write_safetensors(folder / file, tensors, make, weights.release, progress.update)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    weights.release()


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], torch.Tensor],
    release: Callable[[], None] = lambda: None,
    update: Callable[[int], Any] = lambda count: None,
):
    """Writes a safetensors file one tensor after the other; `safetensors.torch.save_file` wants all of them at once.

    Args:
        path: The file.
        tensors: dtype and shape of each tensor.
        make: Gives a tensor by its name.
        release: Called now and then: what was read so far is not needed any more.
        update: Called with the number of bytes written.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    # The widest first, so that each tensor is aligned
    names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    for name in names:
        dtype, shape = tensors[name]
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    since_release = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            tensor = make(name).contiguous()
            dtype, shape = tensors[name]
            if tensor.dtype is not dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} and was announced as {dtype} {shape}."
                )
            count = file.write(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
            update(count)
            since_release += count
            del tensor
            if since_release > RELEASE_AFTER:
                release()
                since_release = 0
    release()


def build_processor(found: Found, tokenizer: str | Path | None = None) -> tuple[Any, list[str]]:
    """A `CocaProcessor`, or the image processor alone where no vocabulary is at hand; and what to say of it."""
    image_processor = build_image_processor(found.config, found.preprocess_cfg)
    built, notes = _find_tokenizer(found, tokenizer)
    if built is None:
        return image_processor, notes
    ids = (built.bos_token_id, built.eos_token_id)
    text = found.config.text_config
    if len(built) > text.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(built):,} tokens, the model {text.vocab_size:,}: give the one that it was trained with "
            "(`--tokenizer`)."
        )
    if ids != (text.bos_token_id, text.eos_token_id):
        notes.append(
            f"BOS and EOS are taken from the tokenizer: {ids} in place of {(text.bos_token_id, text.eos_token_id)}."
        )
        text.bos_token_id, text.eos_token_id = ids
    return CocaProcessor(image_processor, built), notes


def processor_for(source: str | Path, error: OSError, kwargs: dict[str, Any]) -> CocaProcessor:
    """The processor of a checkpoint of another library, for `CocaProcessor.from_pretrained` (see `open_foreign`)."""
    processor, notes = build_processor(open_foreign(source, error, kwargs))
    if not isinstance(processor, CocaProcessor):
        raise ValueError(" ".join(notes))
    return processor


def build_image_processor(config: CocaConfig, preprocess_cfg: Mapping[str, Any]):
    """The image processor that prepares pictures as open_clip does with `preprocess_cfg`."""
    if is_torchvision_available():
        from ..image_processing_coca import CocaImageProcessor as ImageProcessor
    else:
        from ..image_processing_pil_coca import CocaImageProcessorPil as ImageProcessor
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    settings = {
        "image_mean": preprocess_cfg.get("mean"),
        "image_std": preprocess_cfg.get("std"),
        "resize_mode": preprocess_cfg.get("resize_mode"),
        "fill_color": preprocess_cfg.get("fill_color"),
        "resample": {"bilinear": PILImageResampling.BILINEAR, "bicubic": PILImageResampling.BICUBIC}.get(
            preprocess_cfg.get("interpolation")
        ),
    }
    return ImageProcessor(
        size={"shortest_edge": height} if height == width else {"height": height, "width": width},
        crop_size={"height": height, "width": width},
        **{key: value for key, value in settings.items() if value is not None},
    )


def _find_tokenizer(found: Found, given: str | Path | None) -> tuple[Any, list[str]]:
    text, folder = found.config.text_config, found.checkpoint.folder
    length = {"model_max_length": text.max_text_length}
    if given is not None:
        return _open_tokenizer(Path(given), length), []
    if found.family.name == "CONCH" and text.vocab_size == _CONCH_VOCAB_SIZE:
        spec = importlib.util.find_spec("conch")
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            for path in Path(root).glob("open_clip_custom/tokenizers/*.json"):
                return _open_tokenizer(path, length), []
    elif text.vocab_size == _CLIP_VOCAB_SIZE:
        try:
            return CocaTokenizer.from_open_clip_bpe(**length), []
        except FileNotFoundError:
            if tokenizer_files(folder):
                return _open_tokenizer(folder, length), []
            advice = "run `pip install open_clip_torch`, which brings CLIP's vocabulary, and convert again"
            return None, [f"There is no tokenizer: {advice}, or pass `--tokenizer`."]
    if tokenizer_files(folder):
        return _open_tokenizer(folder, length), []
    advice = (
        "pass `--tokenizer` with conch/open_clip_custom/tokenizers/conch_byte_level_bpe_uncased.json of its package"
        if found.family.name == "CONCH"
        else f"pass `--tokenizer` with the one of {text.vocab_size:,} tokens that it was trained with"
    )
    return None, [f"There is no tokenizer beside the weights: {advice}."]


def _open_tokenizer(path: Path, length: dict[str, int]):
    if not path.exists():
        raise FileNotFoundError(f"The tokenizer {path} does not exist.")
    if path.name.endswith((".gz", ".txt")):
        return CocaTokenizer.from_open_clip_bpe(path, **length)
    if path.is_dir():
        settings = path / "tokenizer_config.json"
        own = settings.is_file() and read_json(settings).get("tokenizer_class") == "CocaTokenizer"
        if own or (path / "vocab.json").is_file():
            # OpenAI's files name their end of text as padding; open_clip pads with id 0
            return CocaTokenizer.from_pretrained(path, **length, **({} if own else {"pad_token": "!"}))
        path = path / "tokenizer.json"
    tokens = {token["content"] for token in read_json(path).get("added_tokens", [])}
    specials = {
        name: next((token for token in candidates if token in tokens), None)
        for name, candidates in {
            "bos_token": ("<start_of_text>", "<|startoftext|>", "<s>", "[CLS]"),
            "eos_token": ("<end_of_text>", "<|endoftext|>", "</s>", "[SEP]"),
            "pad_token": ("<pad>", "[PAD]"),
        }.items()
    }
    if specials["bos_token"] is None or specials["eos_token"] is None:
        raise ValueError(f"{path} names no tokens for beginning and end of a text among {sorted(tokens)}.")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **specials, **length)


# ---------------------------------------------------------------------------------------------------------------------
# Back
# ---------------------------------------------------------------------------------------------------------------------


class _Parameters(Mapping):
    """A saved model's parameters, with the output embedding also where it is tied and so not saved."""

    def __init__(self, weights: Weights, config: CocaConfig):
        self.weights = weights
        self.tied = "lm_head.weight" if config.tie_word_embeddings and "lm_head.weight" not in weights else None

    def stored_as(self, name: str) -> str:
        return "model.text_model.embed_tokens.weight" if name == self.tied else name

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[self.stored_as(name)]

    def __iter__(self) -> Iterator[str]:
        yield from self.weights
        if self.tied:
            yield self.tied

    def __len__(self) -> int:
        return len(self.weights) + int(self.tied is not None)


def convert_to_open_clip(source: str | Path, out: str | Path, overwrite: bool = False) -> tuple[dict, list[str]]:
    """Writes a saved model as a folder that open_clip opens: `open_clip.create_model("local-dir:OUT")`.

    Args:
        source: A folder or repository that `CocaForConditionalGeneration.from_pretrained` opens.
        out: The folder to write: `open_clip_config.json` and `open_clip_model.safetensors`.
        overwrite: Replace `out` if it holds a model.

    Returns:
        open_clip's `model_cfg`, and what a user should know.

    Raises:
        ValueError: open_clip cannot compute this model. The message names the field.
    """
    out = Path(out)
    check_out(out, overwrite)
    checkpoint = find(source)
    if (checkpoint.config or {}).get("model_type") != "coca":
        raise ValueError(f'{source} is no saved CoCa of this package: its config.json must have the model_type "coca".')
    config = CocaConfig.from_dict(checkpoint.config)
    weights = checkpoint.weights
    if "text_decoder.final_layer_norm.weight" not in weights:
        raise ValueError(f"open_clip's CoCa has a decoder, the model in {source} has none.")
    parameters = _Parameters(weights, config)
    export = Export(config, parameters)
    notes = []
    if config.text_config.vocab_size != _CLIP_VOCAB_SIZE:
        notes.append(
            "The vocabulary is not CLIP's, which open_clip's tokenizer takes for granted: tokenize texts with the tokenizer of "
            f"{source}."
        )
    dtypes = {name: weights.dtypes[parameters.stored_as(entry.ours[0])] for name, entry in export.entries.items()}
    with torch.device("meta"):
        model = CocaForConditionalGeneration(config).state_dict()
    shapes = {name: tuple(export.tensor(name, model).shape) for name in export.entries}
    total = weights.num_bytes
    with new_folder(out) as folder, logging.tqdm(total=total, unit="B", unit_scale=True, desc="converting") as progress:
        write_safetensors(
            folder / "open_clip_model.safetensors",
            {name: (dtypes[name], shapes[name]) for name in export.entries},
            lambda name: export.tensor(name, parameters),
            weights.release,
            progress.update,
        )
        open_clip_config = {"model_cfg": export.model_cfg, "preprocess_cfg": _preprocess_cfg(checkpoint.folder)}
        text = json.dumps(open_clip_config, indent=2) + "\n"
        (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    return export.model_cfg, notes


def _preprocess_cfg(folder: Path) -> dict[str, Any]:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError):  # saved without one
        return {}
    bilinear = int(processor.resample) == int(PILImageResampling.BILINEAR)
    return {
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "interpolation": "bilinear" if bilinear else "bicubic",
        "resize_mode": processor.resize_mode,
        "fill_color": processor.fill_color,
    }
