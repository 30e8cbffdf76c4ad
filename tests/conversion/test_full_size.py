"""The public architectures at full size, with random weights: converted as files, compared with open_clip, converted back.

Slow, and needs `open_clip_torch`. The largest (L/14, 638 M parameters) holds both models: about 6 GB of memory, and as much
on disk.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modeling_coca import CocaForConditionalGeneration
from modeling_coca.conversion import convert, convert_to_open_clip
from modeling_coca.conversion.sources import Weights

pytestmark = pytest.mark.slow

LISTED = Path(__file__).parents[2].parent / "shared" / "reference" / "open_clip_state_dict_coca_ViT-B-32.txt"
# 76 are LAION's, whose repositories of the base models hold a .bin alone. The others come as Apple's do.
CASES = [(name, length) for name in ("coca_ViT-B-32", "coca_ViT-L-14") for length in (76, 77, 128, 256)]


@pytest.fixture
def scratch(tmp_path):
    """A folder that does not outlive the test: 8 GB for L/14."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("name", "context_length"), [*CASES, ("coca_base", 76)])
@torch.no_grad()
def test_full_size_models_agree(name, context_length, scratch):
    open_clip = pytest.importorskip("open_clip")
    model_cfg = copy.deepcopy(open_clip.get_model_config(name))
    for section in ("text_cfg", "multimodal_cfg"):
        model_cfg[section]["context_length"] = context_length
    torch.manual_seed(0)
    theirs = open_clip.coca_model.CoCa(
        **{key: value for key, value in model_cfg.items() if key != "custom_text"}
    ).eval()
    # open_clip leaves this one uninitialised. With its intended scale, logits have a standard deviation of about 1.
    projection = theirs.text_decoder.text_projection
    torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    # [CLS] and positions start so small that mistakes in them would not show
    torch.nn.init.normal_(theirs.text.cls_emb)
    torch.nn.init.normal_(theirs.text.positional_embedding)

    source, folder, back = scratch / "source", scratch / "ours", scratch / "back"
    source.mkdir()
    state_dict = theirs.state_dict()
    if name == "coca_ViT-B-32" and context_length == 76 and LISTED.is_file():
        listed = [line.split("\t") for line in LISTED.read_text().splitlines()]
        assert len(listed) == 629
        assert {key: str(tuple(x.shape)) for key, x in state_dict.items()} == {key: shape for key, shape, _ in listed}
    if context_length == 76:
        torch.save(state_dict, source / "open_clip_pytorch_model.bin")
    else:
        torch.save(state_dict, source / f"mobileclip2_coca_dfn2b_s13b_context{context_length}.pt")
        (source / "config.json").write_text(json.dumps(model_cfg))
    convert(source, folder)
    ours = CocaForConditionalGeneration.from_pretrained(folder).eval()
    assert ours.config.text_config.max_text_length == context_length
    assert ours.num_parameters() == sum(parameter.numel() for parameter in theirs.parameters())

    size = model_cfg["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size)
    texts = torch.zeros(2, context_length, dtype=torch.long)
    texts[0, :9] = torch.tensor([49406, 320, 1125, 539, 320, 2368, 530, 518, 49407])
    texts[1] = torch.randint(1, 49406, (context_length,))
    texts[1, 0], texts[1, -1] = 49406, 49407

    expected = theirs(images, texts)
    raw_image, raw_text = theirs.encode_image(images, normalize=False), theirs.encode_text(texts, normalize=False)
    image = ours.get_image_features(images)
    labels = texts.masked_fill(texts == 0, -100)
    outputs = ours(input_ids=texts, pixel_values=images, labels=labels, logits_to_keep=0)
    errors = {
        "image": image.image_embeds - expected["image_features"],
        "text": outputs.text_embeds - expected["text_features"],
        "raw image": (ours.model.get_image_features(images).pooler_output - raw_image) / raw_image.abs().max(),
        "raw text": (ours.model.get_text_features(texts).pooler_output - raw_text) / raw_text.abs().max(),
    }
    largest = {key: error.abs().max().item() for key, error in errors.items()}
    assert max(largest.values()) <= 1e-5, largest
    assert torch.equal(outputs.image_embeds, image.image_embeds)

    is_token = texts[:, :-1] != 0
    logits, expected_logits = outputs.logits[:, :-1][is_token], expected["logits"][is_token]
    assert expected_logits.std() == pytest.approx(1, abs=0.2)
    assert (logits - expected_logits).abs().max().item() <= 1e-4
    contrastive, caption = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
        **{key: expected[key] for key in ("image_features", "text_features", "logits", "labels", "logit_scale")}
    )
    assert outputs.contrastive_loss.item() == pytest.approx(contrastive.item(), rel=1e-4)
    assert 2 * outputs.caption_loss.item() == pytest.approx(caption.item(), rel=1e-4)
    # Texts trimmed to their own length give the same
    short = texts[:1, :9]
    trimmed = F.normalize(ours.model.get_text_features(short).pooler_output, dim=-1)
    assert (trimmed - expected["text_features"][:1]).abs().max().item() <= 1e-5
    logits = ours(input_ids=short, pixel_values=images[:1]).logits
    assert (logits[0, :-1] - expected["logits"][0, :8]).abs().max().item() <= 1e-4
    del ours

    back_cfg, _ = convert_to_open_clip(folder, back)
    if context_length != 76:  # else it was read off the tensors, and says more
        assert back_cfg == model_cfg
    written = Weights([back / "open_clip_model.safetensors"])
    assert set(written) == set(state_dict)
    for key, tensor in state_dict.items():
        assert torch.equal(written[key], tensor), key
    rebuilt = open_clip.coca_model.CoCa(**{key: value for key, value in back_cfg.items() if key != "custom_text"})
    assert {key: x.shape for key, x in rebuilt.state_dict().items()} == {key: x.shape for key, x in state_dict.items()}
