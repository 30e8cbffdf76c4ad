"""open_clip's named CoCa models at full size, with random weights, against ours.

Slow, and needs `open_clip_torch`. The largest (L/14, 638 M parameters) holds both models: about 6 GB of memory.
"""

import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modeling_coca.conversion.open_clip import from_open_clip, to_open_clip

pytestmark = pytest.mark.slow

LISTED = Path(__file__).parents[2].parent / "shared" / "reference" / "open_clip_state_dict_coca_ViT-B-32.txt"


@pytest.fixture(params=["coca_ViT-B-32", "coca_ViT-L-14", "coca_base"])
def models(request):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    theirs = open_clip.create_model(request.param).eval()
    # open_clip leaves this one uninitialised. With its intended scale, logits have a standard deviation of about 1.
    projection = theirs.text_decoder.text_projection
    torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    # [CLS] and positions start so small that mistakes in them would not show
    torch.nn.init.normal_(theirs.text.cls_emb)
    torch.nn.init.normal_(theirs.text.positional_embedding)
    model_cfg = open_clip.get_model_config(request.param)
    yield request.param, model_cfg, theirs, from_open_clip(model_cfg, theirs.state_dict())
    del theirs
    gc.collect()


@torch.no_grad()
def test_full_size_models_agree(models):
    name, model_cfg, theirs, ours = models
    size = model_cfg["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size)
    texts = torch.zeros(2, model_cfg["text_cfg"]["context_length"], dtype=torch.long)
    texts[0, :9] = torch.tensor([49406, 320, 1125, 539, 320, 2368, 530, 518, 49407])
    texts[1, :76] = torch.randint(1, 49406, (76,))
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
    assert {key: error.abs().max().item() <= 1e-5 for key, error in errors.items()} == dict.fromkeys(errors, True)
    assert torch.equal(outputs.image_embeds, image.image_embeds)

    is_token = texts[:, :-1] != 0
    logits, expected_logits = outputs.logits[:, :-1][is_token], expected["logits"][is_token]
    assert expected_logits.std() == pytest.approx(1, abs=0.2)
    assert (logits - expected_logits).abs().max().item() <= 1e-4
    # Texts trimmed to their own length give the same
    short = texts[:1, :9]
    trimmed = F.normalize(ours.model.get_text_features(short).pooler_output, dim=-1)
    assert (trimmed - expected["text_features"][:1]).abs().max().item() <= 1e-5
    logits = ours(input_ids=short, pixel_values=images[:1]).logits
    assert (logits[0, :-1] - expected["logits"][0, :8]).abs().max().item() <= 1e-4

    back_cfg, state_dict = to_open_clip(ours)
    assert back_cfg == model_cfg
    expected_state = theirs.state_dict()
    assert set(state_dict) == set(expected_state)
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in expected_state.items())
    if name == "coca_ViT-B-32" and LISTED.is_file():
        listed = [line.split("\t") for line in LISTED.read_text().splitlines()]
        assert len(listed) == 629
        assert {key: str(tuple(x.shape)) for key, x in state_dict.items()} == {key: shape for key, shape, _ in listed}
