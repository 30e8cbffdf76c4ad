"""Which family a checkpoint is of; and why not, where it is of none."""

from collections.abc import Iterable

from . import conch, open_clip, torchmultimodal
from .family import Family
from .table import collapse, strip_wrappers


class OwnLayoutError(ValueError):
    """The checkpoint needs no conversion."""


FAMILIES = [open_clip.FAMILY, conch.FAMILY, torchmultimodal.FAMILY]

_LUCIDRAINS = (
    "This is a CoCa of lucidrains' CoCa-pytorch, which this package does not convert: its text layers compute attention and "
    "a gated (SwiGLU) MLP side by side from one projection, turn queries and keys by rotary embeddings instead of adding "
    "positions, and share one key and value head. None of that is a setting here. Those layers hold 85 % of its README's model, so "
    "that loading the rest would give a model as good as random. Nothing was written. To go on with its weights, stay with CoCa-pytorch; "
    "hub_configs/coca-frozen-vit-large has the same layout of poolers for a training from scratch."
)
_CLIP = (
    "This is a CLIP: it has two encoders and no decoder, so it is no CoCa. Load it with transformers' `CLIPModel` or with open_clip. "
    "Its image encoder can be the frozen encoder of a new CoCa: give its config as `CocaConfig(vision_config=...)`."
)
_OURS = (
    "This is a CoCa in this package's own layout already: open it with `from_pretrained`, or write it for open_clip with "
    "`coca convert SOURCE OUT --to open_clip`."
)


def detect(names: Iterable[str]) -> Family:
    """The family of a checkpoint with tensors of these names.

    Raises:
        ValueError: It is of none. The message says what it seems to be.
    """
    given = list(names)
    if (
        "model.image_pooler.caption_pooler.query" in given
        or "model.vision_model.embeddings.position_embedding.weight" in given
    ):
        raise OwnLayoutError(_OURS)
    stripped = {strip_wrappers(name) for name in given}
    for family in FAMILIES:
        if family.owns(stripped):
            return family
    if {"img_queries", "text_cls_token"} <= stripped:
        raise ValueError(_LUCIDRAINS)
    is_open_clip_clip = any(name.startswith("visual.") for name in stripped) and "logit_scale" in stripped
    is_transformers_clip = {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= stripped
    if is_open_clip_clip or is_transformers_clip:
        raise ValueError(_CLIP)
    parts = collapse(sorted({name.rsplit(".", 1)[0] for name in stripped}))
    raise ValueError(
        f"This is the checkpoint of no CoCa that is known here ({', '.join(family.name for family in FAMILIES)}). It holds "
        f"{len(given)} tensors, among them: {', '.join(part for part, _ in parts[:6])}."
    )
