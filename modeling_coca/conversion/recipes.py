"""The public CoCa checkpoints: licences, published numbers, what each is good for, and how its makers let it generate."""

import re
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """
    Args:
        pattern: Of the names of repositories, folders and files, without regard to case.
        title: For people.
        hub_config: Its folder in `hub_configs/`.
        license: As the Hub names it.
        license_name, license_link: For `license: other`.
        generation: Fields of its `generation_config.json`.
        use: What to use it for, and what not.
        why: Where the generation settings come from.
        published: What its makers measured, and where that stands.
        warning: Said by the conversion, too.
        base_model: What it was fine-tuned from.
    """

    pattern: str
    title: str
    hub_config: str
    license: str
    generation: dict[str, Any]
    use: str
    why: str
    published: str = ""
    warning: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None

    @property
    def name(self) -> str:
        return self.hub_config


# open_clip's `generate(image)`: 5 to 30 ids, BOS and EOS among them, beam search over six beams. Its releases split the
# six into three groups without a penalty for being alike, so that all groups find the same, and add up logits that are no
# log-probabilities: two beams with scores of their own kind, which `generate` of transformers does not offer. Its
# development version searches with six beams and log-probabilities, and that is what stands here.
_BEAMS = {"max_length": 30, "min_length": 5, "num_beams": 6}
_BEAMS_WHY = (
    "Six beams, captions of 5 to 30 ids with BOS and EOS: the defaults of open_clip's `generate`, with which LAION's captions "
    "were written. open_clip's releases add up raw logits over what comes to two beams; its development version, "
    "like this package, adds up log-probabilities over six, so that captions may differ from the releases' by words."
)
_SAMPLES = {"do_sample": True, "top_p": 0.9, "top_k": 0, "min_length": 5, "max_length": 30}
_SAMPLES_WHY = (
    "Samples with top-p 0.9, 5 to 30 ids, as Apple wrote the captions of DFNDR-2B (`scripts/gen.py` of "
    "apple/ml-mobileclip-dr). There a caption ends at its first full stop: cut yours with `caption.split('.')[0]`."
)
_OPEN_CLIP_CSV = "open_clip, `docs/openclip_results.csv` and `docs/openclip_retrieval_results.csv`"
_APPLE = {
    "license": "other",
    "license_name": "apple-amlr",
    "license_link": "https://github.com/apple/ml-mobileclip/blob/main/LICENSE_MODELS",
    "generation": _SAMPLES,
    "why": _SAMPLES_WHY,
    "published": "Table 6 of arXiv 2508.20691 compares them by what a CLIP learns from their captions",
}

# The first whose pattern is found counts
RECIPES = [
    Recipe(
        pattern=r"mscoco_finetuned.*coca.vit.b.32",
        title="LAION's CoCa ViT-B/32, fine-tuned on COCO captions",
        hub_config="coca-vit-b-32-mscoco",
        license="mit",
        generation=_BEAMS,
        use="Captions. Not search or classification: its contrastive heads are dead.",
        why=_BEAMS_WHY,
        published=f"ImageNet-1k zero-shot 0.79 %, COCO text-to-image R@1 0.33 % ({_OPEN_CLIP_CSV})",
        warning="This fine-tune was trained on captions alone, which destroyed its contrastive heads (ImageNet-1k zero-shot "
        "0.79 %, 63.31 % before): use it for captions, and laion/CoCa-ViT-B-32-laion2B-s13B-b90k for search and classification.",
        base_model="laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    ),
    Recipe(
        pattern=r"mscoco_finetuned.*coca.vit.l.14",
        title="LAION's CoCa ViT-L/14, fine-tuned on COCO captions",
        hub_config="coca-vit-l-14-mscoco",
        license="mit",
        generation=_BEAMS,
        use="Captions: the best of LAION's. For search and classification take the base weights.",
        why=_BEAMS_WHY,
        published="COCO captions (Karpathy val) BLEU-4 35.6, METEOR 29.8, CIDEr 125.3, SPICE 23.4; NoCaps CIDEr 106.5 "
        f"(laion.ai/blog/coca). ImageNet-1k zero-shot 72.04 %, COCO text-to-image R@1 53.74 % ({_OPEN_CLIP_CSV})",
        warning="This fine-tune was trained on captions alone, and its contrastive heads were left behind (ImageNet-1k zero-shot "
        "72.04 %, 75.61 % before): use it for captions, and laion/CoCa-ViT-L-14-laion2B-s13B-b90k for search and classification.",
        base_model="laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
    ),
    Recipe(
        pattern=r"coca.vit.b.32.laion2b",
        title="LAION's CoCa ViT-B/32",
        hub_config="coca-vit-b-32",
        license="mit",
        generation=_BEAMS,
        use="Search, zero-shot classification, fine-tuning. Its captions read like alt-texts.",
        why=_BEAMS_WHY,
        published=f"ImageNet-1k zero-shot 63.31 % ({_OPEN_CLIP_CSV})",
    ),
    Recipe(
        pattern=r"coca.vit.l.14.laion2b",
        title="LAION's CoCa ViT-L/14",
        hub_config="coca-vit-l-14",
        license="mit",
        generation=_BEAMS,
        use="Search, zero-shot classification, fine-tuning. Its captions read like alt-texts.",
        why=_BEAMS_WHY,
        published="ImageNet-1k zero-shot 75.61 %, COCO R@1 45.65 % text-to-image and 62.92 % image-to-text, Flickr30k 74.28 % "
        f"and 88.40 % ({_OPEN_CLIP_CSV})",
    ),
    Recipe(
        pattern=r"mobileclip2_coca.*context256",
        title="Apple's captioner for MobileCLIP2, 256 positions",
        hub_config="mobileclip2-coca-context256",
        use="Long, detailed captions of many images; repeats itself more often than those with 77 positions.",
        **_APPLE,
    ),
    Recipe(
        pattern=r"mobileclip2_coca.*context128",
        title="Apple's captioner for MobileCLIP2, 128 positions",
        hub_config="mobileclip2-coca-context128",
        use="Detailed captions of many images.",
        **_APPLE,
    ),
    Recipe(
        pattern=r"mobileclip2_coca",
        title="Apple's captioner for MobileCLIP2, 77 positions",
        hub_config="mobileclip2-coca-context77",
        use="Captions of many images in one or two sentences; of Apple's, `mscoco38k_s12m_context77` is the one that its makers "
        "recommend.",
        **_APPLE,
    ),
    Recipe(
        pattern=r"(^|[/_-])conch($|[/_.-])",
        title="CONCH of the Mahmood Lab",
        hub_config="conch-vit-b-16",
        license="cc-by-nc-nd-4.0",
        generation={},
        use="Search and zero-shot classification in pathology, for research alone. The weights of its decoder were not released: it "
        "writes no captions before you have trained one.",
        why="Nothing is set: there is no decoder to generate with.",
        published="doi.org/10.1038/s41591-024-02856-4",
    ),
]


def find_recipe(*names: str | None) -> Recipe | None:
    """The recipe of the first public checkpoint that one of `names` (repository, folder, file) speaks of."""
    for name in filter(None, names):
        for recipe in RECIPES:
            if re.search(recipe.pattern, str(name), re.IGNORECASE):
                return recipe
    return None
