"""Equalities that hold for any text, image, padding and split, over examples that hypothesis draws (the same ones each time)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DynamicCache

from modeling_coca import CocaForConditionalGeneration, CocaImageProcessorPil, CocaProcessor, CocaTokenizer
from modeling_coca.generation_coca import CACHE_NAME, CocaCache
from modeling_coca.tokenization_coca import clean_text

pytest.importorskip("torchvision")
from modeling_coca import CocaImageProcessor

VOCAB, CONTEXT, SIZE, BOS, EOS = 99, 16, 32, 97, 98
MODES = ["RGB", "L", "RGBA", "LA", "CMYK", "P", "1", "I;16", "I", "F", "YCbCr", "HSV"]
ONE_STEP = 1 / 255 / 0.26130258  # of 8 bits, in normalised units


def examples(number: int):
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


# Any characters, surrogates included, and the pieces that have a meaning of their own
texts = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.characters(),
        st.sampled_from(
            ["<end_of_text>", "<start_of_text>", "<pad>", "&amp;", "'s", "!", "<", "\0", "\ud800", " ", "여우"]
        ),
    ),
    max_size=8,
).map("".join)
tokens = st.integers(1, VOCAB - 3)
rows = st.lists(st.lists(tokens, min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    corpus = ["a photo of a red fox", "two blue whales!", "빨간 여우가 뛴다"] * 8
    return CocaTokenizer(model_max_length=CONTEXT).train_new_from_iterator(corpus, vocab_size=600)


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    text = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT + 1}
    config = tiny_config(text_config={**text, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0})
    model = CocaForConditionalGeneration(config).eval().double()  # differences are of meaning, not of rounding
    model.lm_head.weight.data *= 3
    return model


def images(number: int) -> torch.Tensor:
    return torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).double()


def pad(texts: list[list[int]], side: str = "right", extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; `extra` more columns of padding than the longest text needs."""
    length = max(map(len, texts)) + extra
    ids, mask = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        part = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[row, part], mask[row, part] = torch.tensor(text), 1
    return ids, mask


# -------------------------------------------------------------------------------------------------------------- texts


@examples(60)
@given(text=texts)
def test_a_decoded_text_encodes_to_the_same_ids(tokenizer, text):
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert all(0 <= token < len(tokenizer) for token in ids)
    if not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[1:-1]):
        plain = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cleaned = clean_text(text)
        assert "".join(plain.split()) == "".join(cleaned.split())
        if clean_text(plain) == plain:  # else the spaces between its pieces made something new, as `& amp;`
            assert tokenizer(plain, verbose=False)["input_ids"] == ids


@examples(100)
@given(text=texts, length=st.integers(2, 20))
def test_truncation_keeps_the_ends_and_a_prefix(tokenizer, text, length):
    whole = tokenizer(text, verbose=False)["input_ids"]
    cut = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
    assert len(cut) == min(length, len(whole))
    assert cut[-1] == tokenizer.eos_token_id and cut[:-1] == whole[: len(cut) - 1]


@examples(50)
@given(batch=st.lists(texts, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_a_batch_is_its_texts(tokenizer, batch, side):
    padded = tokenizer(batch, padding=True, padding_side=side, truncation=True)
    for text, ids, mask in zip(batch, padded["input_ids"], padded["attention_mask"], strict=True):
        assert [i for i, real in zip(ids, mask, strict=True) if real] == tokenizer(text, truncation=True)["input_ids"]
        assert all(i == tokenizer.pad_token_id for i, real in zip(ids, mask, strict=True) if not real)
        assert mask == sorted(mask, reverse=side == "right")


@examples(100)
@given(text=texts)
def test_a_cleaned_text_has_single_spaces_and_no_surrogate(text):
    cleaned = clean_text(text)
    assert cleaned == " ".join(cleaned.split()) == cleaned.strip()
    assert not any(0xD800 <= ord(char) < 0xE000 for char in cleaned)


# ------------------------------------------------------------------------------------------------------------- images


@st.composite
def pictures(draw):
    width, height, mode = draw(st.integers(1, 90)), draw(st.integers(1, 90)), draw(st.sampled_from(MODES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    array = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode in ("I", "F"):
        return Image.fromarray(array[..., 0].astype(np.int32 if mode == "I" else np.float32))
    image = Image.fromarray(array)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


PIL, TORCHVISION = CocaImageProcessorPil(size=SIZE), CocaImageProcessor(size=SIZE)


@examples(80)
@given(image=pictures(), resize_mode=st.sampled_from(["shortest", "longest", "squash"]))
def test_any_picture_has_the_right_shape_and_is_equal_in_both_backends(image, resize_mode):
    pil = PIL(image, resize_mode=resize_mode, return_tensors="pt")["pixel_values"]
    assert pil.shape == (1, 3, SIZE, SIZE) and pil.dtype == torch.float32
    assert pil.min() >= -0.49 / 0.268 and pil.max() <= 0.61 / 0.26  # those of black and white
    assert torch.equal(pil, TORCHVISION(image, resize_mode=resize_mode, return_tensors="pt")["pixel_values"])


@examples(40)
@given(width=st.integers(8, 90), height=st.integers(8, 90), colors=st.integers(0, 2**32 - 1))
def test_smooth_tensors_are_near_their_picture(width, height, colors):
    corners = np.random.default_rng(colors).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    array = np.array(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))
    got = TORCHVISION(torch.from_numpy(array).permute(2, 0, 1), return_tensors="pt")["pixel_values"]
    want = PIL(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    assert (got - want).abs().max() <= 2 * ONE_STEP + 1e-5


@examples(25)
@given(batch=st.lists(pictures(), min_size=1, max_size=5), data=st.data())
def test_a_batch_of_pictures_is_its_pictures_in_any_order(tokenizer, batch, data):
    processor = CocaProcessor(PIL, tokenizer)
    order = data.draw(st.permutations(range(len(batch))))
    alone = torch.cat([processor(images=[image], return_tensors="pt")["pixel_values"] for image in batch])
    together = processor(images=[batch[i] for i in order], return_tensors="pt")["pixel_values"]
    assert torch.equal(together, alone[torch.tensor(order)])


# -------------------------------------------------------------------------------------------------------------- model


@examples(25)
@given(bodies=rows, side=st.sampled_from(["left", "right"]), extra=st.integers(0, 4))
def test_padding_changes_neither_embeddings_nor_logits(model, bodies, side, extra):
    texts = [[BOS, *body, EOS] for body in bodies]
    ids, mask = pad(texts, side, extra)
    with torch.no_grad():
        embeds = model.get_text_features(ids, mask).pooler_output
        logits = model(ids, images(len(texts)), attention_mask=mask).logits
        for row, text in enumerate(texts):
            one = torch.tensor([text])
            torch.testing.assert_close(embeds[row], model.get_text_features(one).pooler_output[0], rtol=0, atol=1e-10)
            alone = model(one, images(len(texts))[row : row + 1]).logits[0]
            torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=0, atol=1e-9)


@examples(15)
@given(bodies=rows, side=st.sampled_from(["left", "right"]), beams=st.integers(1, 3), eos=st.booleans())
def test_padding_and_batch_change_no_generated_token(model, bodies, side, beams, eos):
    prompts = [[BOS, *body, *([EOS] if eos else [])] for body in bodies]
    ids, mask = pad(prompts, side)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    together = model.generate(pixel_values=images(len(prompts)), input_ids=ids, attention_mask=mask, **options)
    longest = max(len(body) + 1 for body in bodies)
    for row, prompt in enumerate(prompts):
        alone = model.generate(
            pixel_values=images(len(prompts))[row : row + 1], input_ids=torch.tensor([prompt]), **options
        )
        new = alone[0, len(bodies[row]) + 1 :].tolist()
        got = together[row, longest:].tolist()
        assert got[: len(new)] == new and all(token in (0, EOS) for token in got[len(new) :])


@examples(25)
@given(
    text=st.lists(tokens, min_size=2, max_size=12),
    batch=st.integers(1, 3),
    cuts=st.sets(st.integers(1, 11), max_size=3),
)
def test_a_cache_changes_nothing_wherever_the_text_is_split(model, text, batch, cuts):
    ids = (torch.tensor([[BOS, *text]]) + torch.arange(batch)[:, None] * 3) % (VOCAB - 2)
    ends = [*sorted(cut for cut in cuts if cut < ids.shape[1]), ids.shape[1]]
    with torch.no_grad():
        whole = model(ids, images(batch), use_cache=False).logits
        cache, parts, start = CocaCache(DynamicCache(config=model.config.text_config), DynamicCache()), [], 0
        for end in ends:
            pixels = images(batch) if start == 0 else None
            parts.append(model(ids[:, start:end], pixels, use_cache=True, **{CACHE_NAME: cache}).logits)
            start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-9)


@examples(12)
@given(bodies=rows, beams=st.integers(1, 3), length=st.integers(1, 6))
def test_generating_with_a_cache_gives_the_tokens_of_generating_without(model, bodies, beams, length):
    ids, mask = pad([[BOS, *body] for body in bodies], "left")
    options = {"max_new_tokens": length, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    cached, plain = (
        model.generate(pixel_values=images(len(bodies)), input_ids=ids, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


@examples(8)
@given(number=st.integers(1, 5), data=st.data())
def test_images_in_any_order_and_batch_have_the_same_embeddings(model, number, data):
    single = CocaForConditionalGeneration(model.config).eval()
    single.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    order, pixels = torch.tensor(data.draw(st.permutations(range(number)))), images(number).float()
    with torch.no_grad():
        together = single.get_image_features(pixels[order])
        for row, i in enumerate(order):
            alone = single.get_image_features(pixels[i : i + 1])
            torch.testing.assert_close(together.image_embeds[row], alone.image_embeds[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], rtol=0, atol=1e-5)


@examples(12)
@given(bodies=rows)
def test_losses_do_not_see_padding(model, bodies):
    texts = [[BOS, *body, EOS] for body in bodies]
    losses = []
    for side, extra in (("right", 0), ("left", 2), ("right", 3)):
        ids, mask = pad(texts, side, extra)
        with torch.no_grad():
            outputs = model(ids, images(len(texts)), attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        losses.append(torch.stack([outputs.contrastive_loss, outputs.caption_loss]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(losses[2], losses[0], rtol=0, atol=1e-9)
