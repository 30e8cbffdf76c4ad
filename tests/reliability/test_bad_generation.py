"""Calls of the model and of `generate` that cannot mean anything: each says which input is wrong, and what would be right.

Messages of transformers and torch are here as the user sees them. What passes gives the right numbers.
"""

import pytest
import torch
from transformers import DynamicCache

from modeling_coca import (
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
)
from modeling_coca.generation_coca import CACHE_NAME

VOCAB, CONTEXT, SIZE, BOS, EOS = 99, 16, 32, 97, 98
IDS = torch.tensor([[BOS, 5, 6, EOS], [BOS, 7, EOS, 0]])
ONES = torch.ones_like(IDS)
NAN = float("nan")


@pytest.fixture(scope="module")
def config(tiny_config):
    text = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT + 1}
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    return lambda **changes: tiny_config(text_config={**text, **ids}, **changes)


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    return CocaForConditionalGeneration(config()).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokens(model, pixels):
    return model.get_image_features(pixels).pooler_output.detach()


@pytest.fixture
def given(model, pixels, tokens):
    """What the cases are built from."""

    class Given:
        px, enc = pixels, tokens

        def call(self, ids=IDS, px=pixels, **kwargs):
            return model(ids, px, **kwargs)

        def generate(self, **kwargs):
            image = {} if "encoder_hidden_states" in kwargs else {"pixel_values": pixels}
            return model.generate(**{"max_new_tokens": 3, "do_sample": False, **image, **kwargs})

        def score(self, ids=IDS, px=pixels, *args, **kwargs):
            return model.score_captions(ids, px, *args, **kwargs)

        def cache(self):
            return {CACHE_NAME: model(IDS, pixels, use_cache=True)[CACHE_NAME]}

    given = Given()
    given.model = model
    return given


SHAPE = r"`pixel_values` must have shape \(batch, 3, height, width\), got "
MASK = r"`attention_mask` must have the shape of `input_ids`, which is \(2, 4\), got "

# name: the call, and what the ValueError says
FORWARD = {
    "id beyond the vocabulary": (
        lambda g: g.call(IDS + 5),
        r"less than `text_config.vocab_size` \(99\), got ids from 5 to 103",
    ),
    "id below 0": (lambda g: g.call(IDS - 100), "`text_config.vocab_size`.*got ids from -100 to -2"),
    "ids of floats": (lambda g: g.call(IDS.float()), r"`input_ids` must be token ids \(integers\), got torch.float32"),
    "ids of bools": (lambda g: g.call(IDS > 0), r"`input_ids` must be token ids \(integers\), got torch.bool"),
    "ids in a list": (lambda g: g.call(IDS.tolist()), '`input_ids` must be a tensor, got list.*`return_tensors="pt"`'),
    "ids without a batch": (lambda g: g.call(IDS[0]), r"`input_ids` must have shape \(batch, tokens\).*got \(4,\)"),
    "ids with an axis more": (
        lambda g: g.call(IDS[None]),
        r"`input_ids` must have shape \(batch, tokens\).*\(1, 2, 4\)",
    ),
    "no tokens": (lambda g: g.call(IDS[:, :0]), r"with a token in it, got \(2, 0\)"),
    "no texts": (lambda g: g.call(IDS[:0], g.px[:0]), r"with a token in it, got \(0, 4\)"),
    "a text beyond the context": (lambda g: g.call(ONES.repeat(1, 5)), "20 tokens.*at most 16.*`truncation=True`"),
    "neither ids nor embeddings": (lambda g: g.call(None), "Give `input_ids` or `inputs_embeds`"),
    "ids and embeddings": (lambda g: g.call(inputs_embeds=torch.zeros(2, 4, 32)), "exactly one of `input_ids` and"),
    "embeddings without tokens": (
        lambda g: g.call(None, inputs_embeds=torch.zeros(2, 0, 32)),
        r"`inputs_embeds` must have shape \(batch, tokens, width\)",
    ),
    "pixels of uint8": (lambda g: g.call(px=g.px.to(torch.uint8)), "`pixel_values` must be floats.*got torch.uint8"),
    "pixels of int64": (lambda g: g.call(px=g.px.long()), "`pixel_values` must be floats as the image processor makes"),
    "pixels of bools": (lambda g: g.call(px=g.px > 0), "`pixel_values` must be floats.*got torch.bool"),
    "complex pixels": (lambda g: g.call(px=g.px.to(torch.complex64)), "`pixel_values` must be floats.*complex64"),
    "pixels in a list": (
        lambda g: g.call(px=[g.px]),
        '`pixel_values` must be a tensor, got list.*`return_tensors="pt"`',
    ),
    "pixels in an array": (lambda g: g.call(px=g.px.numpy()), "`pixel_values` must be a tensor, got ndarray"),
    "pixels without a batch": (lambda g: g.call(px=g.px[0]), SHAPE + r"\(3, 32, 32\)"),
    "pixels of six axes": (lambda g: g.call(px=g.px[None, None]), SHAPE + r"\(1, 1, 2, 3, 32, 32\)"),
    "channels last": (lambda g: g.call(px=g.px.permute(0, 2, 3, 1)), SHAPE + r"\(2, 32, 32, 3\)"),
    "one channel": (lambda g: g.call(px=g.px[:, :1]), SHAPE + r"\(2, 1, 32, 32\)"),
    "four channels": (lambda g: g.call(px=g.px[:, [0, 1, 2, 0]]), SHAPE + r"\(2, 4, 32, 32\)"),
    "no images": (lambda g: g.call(px=g.px[:0]), SHAPE + r"\(0, 3, 32, 32\)"),
    "a video without frames": (lambda g: g.call(IDS[:1], g.px[None, :0]), SHAPE + r"\(0, 3, 32, 32\)"),
    "too small": (
        lambda g: g.call(px=g.px[..., :16]),
        "are 32x16 pixels.*`image_size` = 32.*`interpolate_pos_encoding",
    ),
    "one column too many": (lambda g: g.call(px=torch.zeros(2, 3, 32, 33)), "are 32x33 pixels.*`image_size` = 32"),
    "less than a patch": (
        lambda g: g.call(px=g.px[..., :3, :3], interpolate_pos_encoding=True),
        "3x3 pixels, less than one patch of `patch_size` = 8",
    ),
    "pixels and image tokens": (
        lambda g: g.call(encoder_hidden_states=g.enc),
        "Give one of `pixel_values`, `encoder_hid",
    ),
    "no image": (lambda g: g.call(px=None), "No image: give `pixel_values`"),
    "three texts for two images": (lambda g: g.call(IDS[[0, 1, 0]]), "2 images for 3 texts.*each text needs its image"),
    "image tokens of another width": (
        lambda g: g.call(px=None, encoder_hidden_states=g.enc[..., :5]),
        r"`encoder_hidden_states` must have shape \(batch, image tokens, 32\)",
    ),
    "no image tokens": (
        lambda g: g.call(px=None, encoder_hidden_states=g.enc[:, :0]),
        r"image tokens, 32\), got \(2, 0",
    ),
    "image tokens of integers": (
        lambda g: g.call(px=None, encoder_hidden_states=g.enc.long()),
        "`encoder_hidden_states` must be floats",
    ),
    "encoder's states of integers": (
        lambda g: g.call(px=None, image_hidden_states=torch.ones(2, 17, 32).long()),
        "`image_hidden_states` must be floats",
    ),
    "mask too short": (lambda g: g.call(attention_mask=ONES[:, :2]), MASK + r"\(2, 2\)"),
    "mask too long": (lambda g: g.call(attention_mask=ONES.repeat(1, 2)), MASK + r"\(2, 8\)"),
    "mask of one column": (lambda g: g.call(attention_mask=ONES[:, :1]), MASK + r"\(2, 1\)"),
    "mask of one row": (lambda g: g.call(attention_mask=ONES[:1]), MASK + r"\(1, 4\)"),
    "mask without a batch": (lambda g: g.call(attention_mask=ONES[0]), MASK + r"\(4,\)"),
    "mask of three axes": (lambda g: g.call(attention_mask=ONES[None]), MASK + r"\(1, 2, 4\)"),
    "mask too long, with labels": (lambda g: g.call(attention_mask=ONES.repeat(1, 2), labels=IDS), MASK + r"\(2, 8\)"),
    "mask without the cached tokens": (
        lambda g: g.call(IDS[:, :1], None, attention_mask=ONES[:, :1], **g.cache()),
        r"with the 4 tokens in the cache, which is \(2, 5\), got \(2, 1\)",
    ),
    "labels too short": (
        lambda g: g.call(labels=IDS[:, :2]),
        r"`labels` must be .* of shape \(2, 4\), got .* \(2, 2\)",
    ),
    "labels of one row": (lambda g: g.call(labels=IDS[:1]), r"`labels` must be .* of shape \(2, 4\), got .* \(1, 4\)"),
    "labels in a row": (
        lambda g: g.call(labels=IDS.flatten()),
        r"`labels` must be .* of shape \(2, 4\), got .* \(8,\)",
    ),
    "labels of floats": (
        lambda g: g.call(labels=IDS.float()),
        r"`labels` must be token ids \(integers\).*torch.float32",
    ),
    "labels for one image of two": (lambda g: g.call(px=g.px[:1], labels=IDS), "1 images for 2 texts"),
    "a contrastive mask of another batch": (
        lambda g: g.call(labels=IDS, contrastive_mask=torch.tensor([True])),
        r"`contrastive_mask` must have shape \(2,\), got \(1,\)",
    ),
    "chunks of no row": (lambda g: g.call(labels=IDS, contrastive_chunk_size=0), "`contrastive_chunk_size` must be at"),
    "positions beyond the table": (
        lambda g: g.call(position_ids=IDS * 0 + 40),
        r"within `max_position_embeddings` \(17\), got ids from 40 to 40",
    ),
    "a cache beyond the context": (
        lambda g: g.call(ONES.repeat(1, 4), None, **g.cache()),
        r"must end within `max_position_embeddings` \(17\), got ids from 4 to 19",
    ),
    "a cache of more texts": (lambda g: g.call(IDS[:1, :1], None, **g.cache()), r"The cache .* holds 2 texts.* are 1"),
    "a cache of fewer texts": (lambda g: g.call(IDS[[0, 1, 0, 1], :1], None, **g.cache()), "holds 2 texts.* are 4"),
    "two caches": (
        lambda g: g.call(IDS[:, :1], None, cache=DynamicCache(), past_key_values=DynamicCache()),
        "two names of the same thing",
    ),
    "scores of too long texts": (lambda g: g.score(ONES.repeat(1, 5)), "20 tokens.*at most 16"),
    "scores with a mask of another shape": (
        lambda g: g.score(IDS, g.px, ONES[:, :2]),
        "`attention_mask` must have the",
    ),
    "scores with labels of another shape": (
        lambda g: g.score(labels=IDS[:, :2]),
        "`labels` must have the shape of `inp",
    ),
    "scores in batches of 0": (lambda g: g.score(batch_size=0), "`batch_size` must be at least 1, got 0"),
    "scores of no text": (lambda g: g.score(IDS[:0]), "with a token in it"),
    "an embedding of nothing": (lambda g: g.model.model(), "Give `input_ids` .*, `pixel_values` .*, or both"),
    "a contrastive loss of unequal batches": (
        lambda g: g.model.model(IDS, g.px[:1], return_loss=True),
        "one text for each image, got 1 images and 2 texts",
    ),
}

GENERATE = {
    "no image at all": (lambda g: g.model.generate(max_new_tokens=3), "No image: give `pixel_values`"),
    "two kinds of image": (
        lambda g: g.model.generate(pixel_values=g.px, encoder_hidden_states=g.enc),
        "Give one of `pixel_values`, `encoder_hidden_states`",
    ),
    "no images": (lambda g: g.generate(pixel_values=g.px[:0]), "with a token in it|must have shape"),
    "pixels without a batch": (lambda g: g.generate(pixel_values=g.px[0]), SHAPE + r"\(3, 32, 32\)"),
    "pixels without a batch, by position": (lambda g: g.model.generate(g.px[0]), SHAPE + r"\(3, 32, 32\)"),
    "pixels of uint8": (lambda g: g.generate(pixel_values=g.px.to(torch.uint8)), "`pixel_values` must be floats"),
    "one prompt for two images": (lambda g: g.generate(input_ids=IDS[:1]), "2 images for 1 texts"),
    "three prompts for two images": (lambda g: g.generate(input_ids=IDS[[0, 1, 1]]), "2 images for 3 texts"),
    "prompt without a batch": (
        lambda g: g.generate(input_ids=IDS[0]),
        r"`input_ids` must have shape \(batch, tokens\)",
    ),
    "prompt of floats": (lambda g: g.generate(input_ids=IDS.float()), "`input_ids` must be token ids"),
    "prompt of no tokens": (lambda g: g.generate(input_ids=IDS[:, :0]), r"with a token in it, got \(2, 0\)"),
    "prompt of padding only": (lambda g: g.generate(input_ids=IDS * 0), r"no token in row 0, only padding.*\(97\)"),
    "one prompt of padding only": (
        lambda g: g.generate(input_ids=IDS, attention_mask=ONES * torch.tensor([[1], [0]])),
        r"no token in row 1, only padding: a caption starts with `bos_token_id` \(97\)",
    ),
    "id beyond the vocabulary": (
        lambda g: g.generate(input_ids=torch.tensor([[BOS], [VOCAB]])),
        "hold 99, and `text_config.vocab_size` is 99: use the tokenizer that came with the model",
    ),
    "id below 0": (lambda g: g.generate(input_ids=IDS - 100), "`input_ids` hold -100"),
    "mask of another shape": (
        lambda g: g.generate(input_ids=IDS, attention_mask=ONES[:, :2]),
        r"`attention_mask` must have the shape of `input_ids` \(2, 4\), got \(2, 2\)",
    ),
    "mask without its prompt": (
        lambda g: g.generate(attention_mask=ONES),
        r"shape of `input_ids` \(2, 1\), got \(2, 4\)",
    ),
    "prompt that fills the context": (
        lambda g: g.generate(input_ids=torch.full((2, CONTEXT), 5)),
        r"The prompt has 16 tokens, the model's context is 16 .*shorten the prompt",
    ),
    "a cache of another batch": (lambda g: g.generate(pixel_values=g.px[:1], **g.cache()), "holds 2 texts.* are 1"),
    "no new tokens": (lambda g: g.generate(max_new_tokens=0), "`max_new_tokens` must be greater than 0"),
    "new tokens below 0": (
        lambda g: g.generate(max_new_tokens=-1),
        "`max_new_tokens` must be greater than 0, but is -1",
    ),
    "shorter than the prompt": (
        lambda g: g.model.generate(pixel_values=g.px, input_ids=IDS, max_length=2),
        "Input length of input_ids is 3, but `max_length` is set to 2",
    ),
    "no beams": (lambda g: g.generate(num_beams=0), "`num_beams` must be a whole number of at least 1, got 0"),
    "no sequences": (
        lambda g: g.generate(num_return_sequences=0),
        "`num_return_sequences` must be a whole number of at",
    ),
    "more sequences than beams": (
        lambda g: g.generate(num_beams=2, num_return_sequences=3),
        r"`num_return_sequences` \(3\) has to be smaller or equal to `num_beams` \(2\)",
    ),
    "several greedy sequences": (
        lambda g: g.generate(num_return_sequences=2),
        "Greedy methods .*`num_return_sequences`",
    ),
    "a temperature of 0": (lambda g: g.generate(do_sample=True, temperature=0.0), "`temperature` .*strictly positive"),
    "a temperature below 0": (
        lambda g: g.generate(do_sample=True, temperature=-1.0),
        "`temperature` .*strictly positive",
    ),
    "top_k below 0": (lambda g: g.generate(do_sample=True, top_k=-3), "`top_k` has to be a strictly positive integer"),
    "a repetition penalty of 0": (
        lambda g: g.generate(repetition_penalty=0.0),
        "`penalty` has to be a strictly positive",
    ),
    "streaming beams": (
        lambda g: g.generate(num_beams=2, streamer=object()),
        "`streamer` cannot be used with beam search",
    ),
    "an unknown cache": (lambda g: g.generate(cache_implementation="none"), "Invalid `cache_implementation`"),
    "a misspelt argument": (
        lambda g: g.generate(num_bems=3),
        r"`model_kwargs` are not used by the model: \['num_bems'\]",
    ),
    "guidance below 0": (
        lambda g: g.generate(guidance_scale=-1.0),
        "`guidance_scale` must be a number from 0 .* got -1.0",
    ),
    "guidance of NaN": (lambda g: g.generate(guidance_scale=NAN), "`guidance_scale` must be a number from 0"),
    "guidance without end": (
        lambda g: g.generate(guidance_scale=float("inf")),
        "`guidance_scale` must be a number from",
    ),
    "guidance in words": (lambda g: g.generate(guidance_scale="2"), "`guidance_scale` must be a number .* got '2'"),
    "a null image without guidance": (
        lambda g: g.generate(null_image_tokens=g.enc[:1]),
        "`null_image_tokens` are for guidance: give a `guidance_scale` too",
    ),
    "two null images": (lambda g: g.generate(guidance_scale=2.0, null_image_tokens=g.enc), "one null image.* hold 2"),
    "a null image of another width": (
        lambda g: g.generate(guidance_scale=2.0, null_image_tokens=g.enc[:1, :, :5]),
        r"must have shape \(batch, image tokens, 32\), got \(1, 6, 5\)",
    ),
    "guidance by another prompt": (
        lambda g: g.generate(guidance_scale=2.0, negative_prompt_ids=IDS),
        "leave out `negative_prompt_ids`",
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_calls_that_mean_nothing(name, given):
    call, message = FORWARD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(given)


@pytest.mark.parametrize("name", GENERATE)
def test_generation_that_means_nothing(name, given):
    call, message = GENERATE[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(given)


# What torch and transformers say in their own words
OTHERS = {
    "pixels on another device": (
        lambda g: g.call(px=g.px.to("meta")),
        RuntimeError,
        "on device meta is not on the expected",
    ),
    "generating from another device": (lambda g: g.generate(pixel_values=g.px.to("meta")), RuntimeError, "device meta"),
    "labels beyond the vocabulary": (lambda g: g.call(labels=IDS + 500), RuntimeError, "index .* is out of bounds"),
    "embeddings of another width": (
        lambda g: g.call(None, inputs_embeds=torch.zeros(2, 4, 7)),
        RuntimeError,
        r"size of tensor a \(7\) must match",
    ),
    "a cache of the old kind": (
        lambda g: g.call(IDS[:, :1], None, **{CACHE_NAME: ((1, 2),)}),
        TypeError,
        "not a Cache",
    ),
    "positions of another shape": (lambda g: g.call(position_ids=IDS[:, :2] * 0), RuntimeError, "must match"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_errors_of_others(name, given):
    call, kind, message = OTHERS[name]
    with pytest.raises(kind, match=message):
        call(given)


# name: a call that is odd but means something, and the plain one that it equals
EQUAL = {
    "ids of int32": (lambda g: g.call(IDS.int()), lambda g: g.call()),
    "pixels of float64": (lambda g: g.call(px=g.px.double()), lambda g: g.call()),
    "pixels of bfloat16": (lambda g: g.call(px=g.px.bfloat16()), lambda g: g.call(px=g.px.bfloat16().float())),
    "image tokens of float64": (
        lambda g: g.call(px=None, encoder_hidden_states=g.enc.double()),
        lambda g: g.call(px=None, encoder_hidden_states=g.enc),
    ),
    "image tokens of bfloat16": (
        lambda g: g.call(px=None, encoder_hidden_states=g.enc.bfloat16()),
        lambda g: g.call(px=None, encoder_hidden_states=g.enc.bfloat16().float()),
    ),
    "a mask of floats": (lambda g: g.call(attention_mask=ONES.float()), lambda g: g.call(attention_mask=ONES)),
    "a mask of bools": (lambda g: g.call(attention_mask=ONES > 0), lambda g: g.call(attention_mask=ONES)),
    "a video of one frame": (lambda g: g.call(px=g.px[:, None]), lambda g: g.call()),
    "pixels that are not contiguous": (
        lambda g: g.call(px=g.px.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        lambda g: g.call(),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_odd_calls_with_a_meaning(name, given):
    odd, plain = EQUAL[name]
    with torch.no_grad():
        torch.testing.assert_close(odd(given).logits, plain(given).logits, rtol=0, atol=1e-5)


def test_no_label_is_no_captioning_loss(given):
    outputs = given.call(labels=torch.full_like(IDS, -100))
    assert outputs.caption_loss == 0 and outputs.loss.isfinite()


def test_generation_stops_at_the_context_whatever_was_asked_for(given):
    prompt = torch.full((2, CONTEXT - 2), 5)
    assert given.generate(input_ids=prompt, max_new_tokens=100, eos_token_id=None).shape == (2, CONTEXT)


def test_two_prompts_for_each_image_stand_next_to_each_other(given):
    together = given.generate(input_ids=torch.tensor([[BOS, 5], [BOS, 6], [BOS, 7], [BOS, 8]]))
    for row, (prompt, image) in enumerate([(5, 0), (6, 0), (7, 1), (8, 1)]):
        alone = given.generate(pixel_values=given.px[image : image + 1], input_ids=torch.tensor([[BOS, prompt]]))
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_more_tokens_at_least_than_at_most_is_warned_about(given):
    with pytest.warns(UserWarning, match="Unfeasible length constraints"):
        given.generate(min_new_tokens=9)


# The other heads
def test_other_heads_name_the_input(config, pixels):
    classifier = CocaForImageClassification(config(num_labels=3)).eval()
    answerer = CocaForVisualQuestionAnswering(config(num_labels=3)).eval()
    for call, message in (
        (lambda: classifier(pixels.to(torch.uint8)), "`pixel_values` must be floats"),
        (lambda: classifier(pixels[0]), SHAPE),
        (lambda: classifier(pixels, image_hidden_states=pixels), "Give one of"),
        (lambda: answerer(IDS, pixels.long()), "`pixel_values` must be floats"),
        (lambda: answerer(IDS, pixels, labels=torch.zeros(2, 4)), r"`labels` must be answer ids .* or scores"),
        (lambda: answerer(IDS, pixels, ONES[:, :2]), "`attention_mask` must have the shape"),
        (lambda: answerer(IDS + VOCAB, pixels), "`text_config.vocab_size`"),
        (lambda: answerer(None, pixels), "exactly one of `input_ids` and `inputs_embeds`"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        classifier(pixels, labels=torch.tensor([0, 7]))


# --------------------------------------------------------------------------------------------------------- pipelines

PIPELINE = {
    "no image": (lambda c, v, im: c(None), (TypeError, ValueError), "expected a path|NoneType|image"),
    "a number": (lambda c, v, im: c(3), TypeError, "expected a path, a URL, a base64 string or a PIL image, not int"),
    "a text": (lambda c, v, im: c("a red square"), ValueError, "'a red square' cannot be loaded.*must be a path"),
    "a file that is not there": (lambda c, v, im: c("gone.png"), ValueError, "'gone.png' cannot be loaded"),
    "a bad one among good ones": (lambda c, v, im: c([im, "gone.png"]), ValueError, "'gone.png' cannot be loaded"),
    "a prompt that is no text": (
        lambda c, v, im: c(im, prompt=3),
        ValueError,
        "`text` must be a string or list of strings",
    ),
    "a prompt beyond the context": (
        lambda c, v, im: c(im, prompt="red " * 40),
        ValueError,
        "A text has .* limit is 16",
    ),
    "a misspelt argument": (lambda c, v, im: c(im, num_bems=2), ValueError, r"\['num_bems'\]"),
    "no question": (lambda c, v, im: v(im), ValueError, 'Give an image and a question, or {"image"'),
    "a question without an image": (lambda c, v, im: v({"question": "a"}), ValueError, "Give an image and a question"),
    "two images for three questions": (
        lambda c, v, im: v([im, im], ["a", "b", "c"]),
        ValueError,
        "2 images for 3 questions: give one for each, or one",
    ),
    "no answers": (lambda c, v, im: v(im, "a", top_k=0), ValueError, "`top_k` must be at least 1, got 0"),
    "an unknown function": (
        lambda c, v, im: v(im, "a", function_to_apply="max"),
        ValueError,
        "`function_to_apply` must",
    ),
}


@pytest.fixture(scope="module")
def pipelines(model_folder):
    from transformers import pipeline

    return tuple(pipeline(task, model=str(model_folder)) for task in ("image-captioning", "coca-vqa"))


@pytest.mark.parametrize("name", PIPELINE)
def test_pipelines_say_what_is_wrong(name, pipelines):
    from PIL import Image

    call, kind, message = PIPELINE[name]
    with pytest.raises(kind, match=message):
        call(*pipelines, Image.new("RGB", (SIZE, SIZE)))
