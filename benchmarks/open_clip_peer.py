"""open_clip's CoCa and ours with the same weights, and ways to make open_clip's write captions under today's transformers.

The release's own `generate` does not run there (its beam scorer is gone from transformers). What it computes is kept: the
image once, and for each new token the whole text again, with the logits of every position.
"""

import copy
import json
from pathlib import Path

import open_clip
import torch
from open_clip.coca_model import CoCa
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from modeling_coca import CocaForConditionalGeneration
from modeling_coca.conversion import from_open_clip

BOS, EOS = 49406, 49407


def load_pair(name: str, device: str, dtype: str) -> tuple[CoCa, CocaForConditionalGeneration]:
    """Random weights of real scale: `name` is an open_clip model config or a JSON file with one."""
    cfg = json.loads(Path(name).read_text()) if name.endswith(".json") else open_clip.get_model_config(name)
    if cfg is None or "multimodal_cfg" not in cfg:
        raise ValueError(
            f"`--model {name}` is no CoCa config of open_clip (coca_ViT-B-32, coca_ViT-L-14, a JSON file)."
        )
    torch.manual_seed(0)
    init = {key: value for key, value in cfg.items() if key != "custom_text"}
    theirs = CoCa(**init).eval()
    # Left uninitialised by open_clip
    projection = theirs.text_decoder.text_projection
    torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    ours = from_open_clip(cfg, theirs.state_dict()).eval()
    dtype = getattr(torch, dtype)
    return theirs.to(device, dtype), ours.to(device, dtype)


def packed(ours: CocaForConditionalGeneration) -> CocaForConditionalGeneration | None:
    """A copy with packed linear layers, where that does anything."""
    parameter = next(ours.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return None
    copied = copy.deepcopy(ours)
    copied.pack_linear_layers()
    return copied


@torch.inference_mode()
def greedy(theirs: CoCa, images: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1 + new_tokens), end-of-text disabled."""
    image_latent, image_embs = theirs._encode_image(images)
    ids = torch.full((images.shape[0], 1), BOS, device=images.device)
    for _ in range(new_tokens):
        outputs = theirs(images, ids, image_latent=image_latent, image_embs=image_embs, output_labels=False)
        logits = outputs["logits"][:, -1]
        logits[:, EOS] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


class OpenClipGenerator(PreTrainedModel, GenerationMixin):
    """open_clip's model behind transformers' own beam search, without a cache, which it has none of."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: CoCa):
        super().__init__(
            PretrainedConfig(is_encoder_decoder=False, vocab_size=model.text_decoder.text_projection.shape[1])
        )
        self.model = model
        self.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=0)

    def forward(self, input_ids, image_latent, image_embs, **kwargs):
        outputs = self.model(None, input_ids, image_latent=image_latent, image_embs=image_embs, output_labels=False)
        logits = outputs["logits"]
        logits[..., EOS] = -torch.inf
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids, image_latent, image_embs, **kwargs):
        return {"input_ids": input_ids, "image_latent": image_latent, "image_embs": image_embs}

    @torch.inference_mode()
    def beams(self, images: torch.Tensor, new_tokens: int, num_beams: int) -> torch.Tensor:
        image_latent, image_embs = self.model._encode_image(images)
        ids = torch.full((images.shape[0], 1), BOS, device=images.device)
        return self.generate(
            ids,
            image_latent=image_latent,
            image_embs=image_embs,
            num_beams=num_beams,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=False,
        )


@torch.inference_mode()
def our_captions(ours: CocaForConditionalGeneration, images: torch.Tensor, new_tokens: int, num_beams: int = 1):
    """The same by our `generate`."""
    return ours.generate(
        images,
        max_new_tokens=new_tokens,
        num_beams=num_beams,
        do_sample=False,
        suppress_tokens=[EOS],
        eos_token_id=None,
    )
