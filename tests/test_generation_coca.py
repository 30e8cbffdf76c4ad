"""`generate()`: every way to decode equals the plain loop without cache, and each image is read once."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor
from transformers.utils import logging as transformers_logging

from modeling_coca.configuration_coca import CocaConfig
from modeling_coca.generation_coca import CACHE_NAME, CocaCache, CocaGuidanceLogitsProcessor
from modeling_coca.modeling_coca import CocaForConditionalGeneration

BOS, EOS, PAD, VOCABULARY, CONTEXT = 57, 58, 0, 61, 14
NUM_QUERIES, UNIMODAL, MULTIMODAL = 3, 2, 3


def build(text=None, **kwargs) -> CocaForConditionalGeneration:
    """Double precision, so that no comparison of tokens hangs on rounding."""
    torch.manual_seed(0)
    config = CocaConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": UNIMODAL + MULTIMODAL,
            "num_multimodal_layers": MULTIMODAL,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT + 1,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **(text or {}),
        },
        **{
            "projection_dim": 16,
            "num_query_tokens": NUM_QUERIES,
            "pooler_hidden_size": 40,
            "num_pooler_attention_heads": 5,
            **kwargs,
        },
    )
    model = CocaForConditionalGeneration(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in model.text_decoder.layers:  # images matter
            layer.cross_block.cross_attn.v_proj.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def model() -> CocaForConditionalGeneration:
    return build()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


PROMPTS = [[BOS], [BOS, 7, 8, 9], [BOS, 11, 12]]


def pad(texts, side="left", extra=0):
    length = max(map(len, texts)) + extra
    ids, masks = [], []
    for text in texts:
        fill, ones = [PAD] * (length - len(text)), [1] * len(text)
        ids.append(fill + text if side == "left" else text + fill)
        masks.append([0] * len(fill) + ones if side == "left" else ones + [0] * len(fill))
    return torch.tensor(ids), torch.tensor(masks)


@torch.no_grad()
def argmax_loop(model, prompt: list[int], image: torch.Tensor, steps: int) -> list[int]:
    """The definition: no cache, no padding, one text at a time."""
    tokens = list(prompt)
    for _ in range(steps):
        ids = torch.tensor([tokens])
        logits = model(ids, image[None], torch.ones_like(ids), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens


def trim(sequence: torch.Tensor) -> list[int]:
    """Without the padding in front, and without what follows the first EOS that was generated."""
    tokens = sequence.tolist()
    tokens = tokens[tokens.index(BOS) :]
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def count_calls(*modules):
    calls = []
    for module in modules:
        seen = []

        def record(_, args, kwargs, seen=seen):
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            seen.append(tuple(first.shape))

        module.register_forward_pre_hook(record, with_kwargs=True)
        calls.append(seen)
    return calls


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def complaints():
    """Everything that is logged at warning level, or warned about, while a test runs."""
    handler, names = Records(), ("transformers", "modeling_coca", "modeling_coca.generation_coca")
    for name in ("warning_once", "info_once"):
        getattr(getattr(transformers_logging.get_logger("transformers"), name), "cache_clear", lambda: None)()
    for name in names:
        logging.getLogger(name).addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: handler.messages + [str(warning.message) for warning in caught]
    for name in names:
        logging.getLogger(name).removeHandler(handler)


# ------------------------------------------------------------------------------------------------- greedy and beams


def test_the_test_model_says_something(model):
    """Captions depend on the image, and some end by themselves: else the comparisons below show little."""
    captions = [trim(row) for row in model.generate(images(24), do_sample=False)]
    assert len(set(map(tuple, captions))) > 12
    assert len({caption[1] for caption in captions}) > 3
    assert {len(caption) for caption in captions} - {CONTEXT}
    assert any(len(caption) == CONTEXT for caption in captions)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="default"),
        pytest.param({"pooler_type": "parallel"}, id="parallel"),
        pytest.param({"pooler_type": "shared"}, id="shared"),
        pytest.param({"pooler_type": "none"}, id="none"),
        pytest.param({"text": {"use_cls_token": False, "max_position_embeddings": CONTEXT}}, id="no_cls_token"),
        pytest.param({"text": {"shifted_cls_mask": True, "cls_position": "next"}}, id="quirks"),
        pytest.param({"text": {"num_multimodal_layers": UNIMODAL + MULTIMODAL}}, id="no_unimodal_layers"),
    ],
)
def test_greedy_is_the_argmax_loop(changes, use_cache):
    model = build(**changes)
    sequences = model.generate(images(3), do_sample=False, use_cache=use_cache)
    for row, image in enumerate(images(3)):
        assert trim(sequences[row]) == argmax_loop(model, [BOS], image, CONTEXT - 1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_say_the_same(implementation):
    model = build()
    model.set_attn_implementation(implementation)
    ids, mask = pad(PROMPTS)
    sequences = model.generate(pixel_values=images(3), input_ids=ids, attention_mask=mask, do_sample=False)
    for row, prompt in enumerate(PROMPTS):
        assert trim(sequences[row]) == argmax_loop(model, prompt, images(3)[row], CONTEXT - len(PROMPTS[1]))


@pytest.mark.parametrize("kwargs", [{"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 3}], ids=["2", "4-3"])
@pytest.mark.parametrize("prompted", [False, True], ids=["no_prompt", "prompts"])
def test_beams_with_cache_equal_beams_without(model, kwargs, prompted):
    ids, mask = pad(PROMPTS)
    inputs = {"pixel_values": images(3), "do_sample": False, "max_new_tokens": 9, **kwargs}
    inputs |= {"input_ids": ids, "attention_mask": mask} if prompted else {}
    with_cache, without = model.generate(**inputs), model.generate(**inputs, use_cache=False)
    assert torch.equal(with_cache, without)
    assert with_cache.shape[0] == 3 * kwargs.get("num_return_sequences", 1)


def test_beams_equal_a_search_by_hand(model):
    """Of all continuations of 2 tokens, beams as many as the vocabulary find the best one."""
    image = images(1)
    with torch.no_grad():
        first = model(torch.tensor([[BOS]]), image).logits[0, -1].log_softmax(-1)
        pairs = torch.tensor([[BOS, token] for token in range(VOCABULARY)])
        second = model(pairs, image).logits[:, -1].log_softmax(-1)
    scores = first[:, None] + second
    scores[EOS] = scores[:, EOS] = -torch.inf  # `min_new_tokens`
    best = divmod(int(scores.argmax()), VOCABULARY)
    found = model.generate(
        image, max_new_tokens=2, min_new_tokens=2, num_beams=VOCABULARY, do_sample=False, length_penalty=0.0
    )
    assert found[0].tolist() == [BOS, *best]


def test_beams_do_not_mix_images(model):
    """A batch equals its images one at a time."""
    together = model.generate(images(4), num_beams=3, do_sample=False)
    for row in range(4):
        alone = model.generate(images(4)[row : row + 1], num_beams=3, do_sample=False)
        assert trim(together[row]) == trim(alone[0])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_sampling_is_reproducible(model, use_cache):
    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return model.generate(images(2), do_sample=True, num_return_sequences=4, max_new_tokens=6, **kwargs)

    first = sample(0)
    assert first.shape[0] == 8
    assert torch.equal(first, sample(0, use_cache=use_cache))
    assert not torch.equal(first, sample(1))
    assert len({tuple(row) for row in first[:4].tolist()}) > 1


def test_beam_sampling(model):
    torch.manual_seed(0)
    first = model.generate(images(2), do_sample=True, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    torch.manual_seed(0)
    second = model.generate(
        images(2), do_sample=True, num_beams=3, num_return_sequences=2, max_new_tokens=5, use_cache=False
    )
    assert torch.equal(first, second)


def test_sampled_texts_of_an_image_see_that_image(model):
    """Rows are image 0, image 0, image 1, image 1: the logits of each are those of its own."""
    outputs = model.generate(
        images(2),
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=3,
        min_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        expected = model(outputs.sequences, images(2).repeat_interleave(2, 0)).logits
    for step in range(3):
        torch.testing.assert_close(outputs.logits[step].double(), expected[:, step], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("eos", [False, True], ids=["open", "eos"])
@pytest.mark.parametrize(("side", "extra"), [("left", 0), ("right", 0), ("left", 2), ("right", 2)])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no_cache"])
def test_prompts_of_unequal_length_equal_each_alone(model, side, extra, eos, masked, kwargs):
    """However they are padded, and with or without the tokenizer's EOS."""
    prompts = [prompt + [EOS] * eos for prompt in PROMPTS]
    ids, mask = pad(prompts, side, extra)
    sequences = model.generate(
        pixel_values=images(3),
        input_ids=ids,
        attention_mask=mask if masked else None,
        max_new_tokens=5,
        do_sample=False,
        **kwargs,
    )
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(
            pixel_values=images(3)[row : row + 1],
            input_ids=torch.tensor([prompt]),
            max_new_tokens=5,
            do_sample=False,
            **kwargs,
        )
        assert trim(sequences[row]) == trim(alone[0])
        assert trim(sequences[row])[: len(prompt)] == prompt
    assert sequences.shape[1] <= max(map(len, PROMPTS)) + 5


def test_an_empty_text_starts_a_caption(model):
    expected = model.generate(images(2), do_sample=False)
    ids = torch.tensor([[BOS, EOS]] * 2)
    assert torch.equal(model.generate(pixel_values=images(2), input_ids=ids, do_sample=False), expected)
    padded = F.pad(ids, (0, 3), value=PAD)
    mask = (padded != PAD).long()
    assert torch.equal(
        model.generate(pixel_values=images(2), input_ids=padded, attention_mask=mask, do_sample=False), expected
    )
    assert torch.equal(
        model.generate(pixel_values=images(2), inputs=torch.tensor([[BOS]] * 2), do_sample=False), expected
    )


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
def test_a_token_with_the_id_of_padding_counts(model, masked):
    """It is "!" in CLIP's vocabulary."""
    prompt = [BOS, 7, PAD, 9]
    ids = torch.tensor([prompt])
    kwargs = {"attention_mask": torch.ones_like(ids)} if masked else {}
    sequence = model.generate(pixel_values=images(1), input_ids=ids, max_new_tokens=5, do_sample=False, **kwargs)
    assert sequence[0].tolist() == argmax_loop(model, prompt, images(1)[0], 5)
    # at the end of a prompt only a mask can tell
    if masked:
        prompt = [BOS, 7, 9, PAD]
        sequence = model.generate(
            pixel_values=images(1), input_ids=torch.tensor([prompt]), max_new_tokens=5, do_sample=False, **kwargs
        )
        assert sequence[0].tolist() == argmax_loop(model, prompt, images(1)[0], 5)


def test_generated_padding_tokens_are_kept():
    """A caption goes on after a token of the padding's id."""
    model = build()
    with torch.no_grad():  # the token wins every other step: it dislikes itself
        model.lm_head.weight[PAD] = model.lm_head.weight[int(model.generate(images(1), max_new_tokens=1)[0, 1])] * 1.5
    sequence = model.generate(images(1), max_new_tokens=8, do_sample=False)[0].tolist()
    assert PAD in sequence
    assert sequence == argmax_loop(model, [BOS], images(1)[0], 8)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 1}],
    ids=["cache", "no_cache", "static", "prompt_lookup", "one_beam"],
)
@pytest.mark.parametrize("prompt", [[BOS, 7, PAD, 9], [BOS, PAD, PAD, 9], [BOS, 7, 9, PAD]], ids=str)
def test_open_clips_mask_while_generating(prompt, kwargs):
    """Its quirk: a token of the padding's id hides the one behind it. Also from the tokens to come."""
    model = build(text={"shifted_cls_mask": True})
    expected = argmax_loop(model, prompt, images(1)[0], 6)
    ids = torch.tensor([prompt])
    assert expected != argmax_loop(build(), prompt, images(1)[0], 6)
    mask = torch.ones_like(ids)
    sequence = model.generate(
        pixel_values=images(1), input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **kwargs
    )
    assert sequence[0].tolist() == expected
    if "prompt_lookup_num_tokens" not in kwargs:  # of which transformers has one for one text
        ids, mask = pad([prompt, [BOS, 11]], extra=1)
        sequences = model.generate(
            pixel_values=images(2), input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **kwargs
        )
        assert trim(sequences[0]) == expected
        assert trim(sequences[1]) == argmax_loop(model, [BOS, 11], images(2)[1], 6)


def test_beams_with_open_clips_mask():
    model = build(text={"shifted_cls_mask": True})
    with torch.no_grad():  # beams part at tokens of the padding's id
        model.lm_head.weight[PAD] = 1.1 * model.lm_head.weight[23]
    kwargs = {"pixel_values": images(3), "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8}
    expected = model.generate(**kwargs, do_sample=False, use_cache=False)
    assert (expected == PAD).any()
    assert torch.equal(model.generate(**kwargs, do_sample=False), expected)


def test_several_prompts_for_one_image(model):
    ids, mask = pad(PROMPTS)
    kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    for more in ({}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}):
        shared = model.generate(pixel_values=images(1), **kwargs, **more)
        repeated = model.generate(pixel_values=images(1).expand(3, -1, -1, -1), **kwargs, **more)
        assert torch.equal(shared, repeated)
    two = model.generate(
        pixel_values=images(2),
        input_ids=ids[[0, 1, 0, 1]],
        attention_mask=mask[[0, 1, 0, 1]],
        max_new_tokens=5,
        num_beams=2,
    )
    repeated = model.generate(
        pixel_values=images(2).repeat_interleave(2, 0),
        input_ids=ids[[0, 1, 0, 1]],
        attention_mask=mask[[0, 1, 0, 1]],
        max_new_tokens=5,
        num_beams=2,
    )
    assert torch.equal(two, repeated)


@pytest.mark.parametrize("eos", [0, [1, 2], [0, 58]], ids=str)
def test_other_eos_ids(eos):
    model = build(text={"eos_token_id": eos, "pad_token_id": 5, "bos_token_id": 57})
    last = eos if isinstance(eos, int) else eos[0]
    expected = model.generate(images(1), max_new_tokens=4, do_sample=False)
    found = model.generate(
        pixel_values=images(1), input_ids=torch.tensor([[57, last]]), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(found, expected)


def test_no_eos_at_all():
    model = build(text={"eos_token_id": None})
    sequence = model.generate(pixel_values=images(1), input_ids=torch.tensor([[BOS, 7]]), do_sample=False)
    assert sequence.shape == (1, CONTEXT)


def test_a_prompt_of_eos_alone_is_kept(model):
    ids = torch.tensor([[EOS]])
    sequence = model.generate(
        pixel_values=images(1), input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False
    )
    assert sequence[0, 0] == EOS
    assert sequence.shape == (1, 3)


# ---------------------------------------------------------------------------------------------------- image inputs


def test_image_inputs_are_equal(model):
    with torch.no_grad():
        features = model.get_image_features(images(2))
    kwargs = {"do_sample": False, "num_beams": 2}
    expected = model.generate(pixel_values=images(2), **kwargs)
    assert torch.equal(model.generate(images(2), **kwargs), expected)
    assert torch.equal(model.generate(image_hidden_states=features.last_hidden_state, **kwargs), expected)
    assert torch.equal(model.generate(encoder_hidden_states=features.pooler_output, **kwargs), expected)
    ids, mask = pad(PROMPTS[:2])
    kwargs |= {"input_ids": ids, "attention_mask": mask}
    expected = model.generate(pixel_values=images(2), **kwargs)
    assert torch.equal(model.generate(image_hidden_states=features.last_hidden_state, **kwargs), expected)
    assert torch.equal(model.generate(encoder_hidden_states=features.pooler_output, **kwargs), expected)


def test_other_image_sizes(model):
    larger = torch.randn(2, 3, 12, 16).double()
    with torch.no_grad():
        tokens = model.get_image_features(larger, interpolate_pos_encoding=True).pooler_output
    expected = model.generate(encoder_hidden_states=tokens, do_sample=False)
    assert torch.equal(model.generate(larger, interpolate_pos_encoding=True, do_sample=False), expected)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 5}], ids=["greedy", "beams", "samples"]
)
def test_an_image_is_read_once(kwargs, use_cache):
    model = build()
    layers = model.text_decoder.layers
    keys = [layer.cross_block.cross_attn.k_proj for layer in layers]
    vision, pooler, contrastive, decoder, *projections = count_calls(
        model.model.vision_model,
        model.model.image_pooler.caption_pooler,
        model.model.image_pooler.contrastive_pooler,
        model.text_decoder,
        *keys,
    )
    model.generate(images(2), max_new_tokens=6, min_new_tokens=6, use_cache=use_cache, **kwargs)
    assert vision == [(2, 3, 8, 8)]
    assert len(pooler) == 1
    assert contrastive == []
    steps = 1 if use_cache else 6
    for calls in projections:  # rows are images, not images x beams
        assert calls == [(2, NUM_QUERIES, 40)] * steps
    rows = 2 * max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    assert len(decoder) == 6
    assert {shape[0] for shape in decoder} == {rows}
    assert [shape[1] for shape in decoder] == ([1] * 6 if use_cache else [1, 2, 3, 4, 5, 6])


def test_output_layer_runs_on_the_last_position_only():
    model = build()
    (head,) = count_calls(model.lm_head)
    ids, mask = pad(PROMPTS)
    model.generate(pixel_values=images(3), input_ids=ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
    assert head == [(3, 1, 32)] * 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "`pixel_values`, `image_hidden_states` or `encoder_hidden_states`"),
        (
            {"pixel_values": images(1), "encoder_hidden_states": torch.zeros(1, NUM_QUERIES, 40).double()},
            "one of `pixel_values`, `encoder_hidden_states`",
        ),
        ({"encoder_hidden_states": torch.zeros(1, NUM_QUERIES, 8).double()}, "`encoder_hidden_states`.*40"),
        ({"image_hidden_states": torch.zeros(1, 5, 8).double()}, "`image_hidden_states`.*24"),
        ({"pixel_values": images(1)[:, :1]}, "`pixel_values`"),
        ({"pixel_values": images(2), "input_ids": torch.full((3, 1), BOS)}, "2 images for 3 texts"),
        (
            {"pixel_values": images(1), "input_ids": torch.tensor([[BOS, 5]]), "attention_mask": torch.ones(1, 3)},
            "`attention_mask` must have the shape",
        ),
    ],
    ids=["no_image", "two_images", "token_width", "encoder_width", "channels", "rows", "mask"],
)
def test_errors_name_the_input(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**({"input_ids": torch.tensor([[BOS]])} | kwargs), max_new_tokens=2)


# ---------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=["greedy", "beams", "samples"]
)
@pytest.mark.parametrize("prompted", [False, True], ids=["no_prompt", "prompts"])
def test_static_cache_equals_dynamic_cache(model, kwargs, prompted):
    ids, mask = pad(PROMPTS)
    inputs = {"pixel_values": images(3), "do_sample": False, "max_new_tokens": 7, **kwargs}
    inputs |= {"input_ids": ids, "attention_mask": mask} if prompted else {}

    def run(**more):
        torch.manual_seed(0)
        return model.generate(**inputs, **more)

    expected = run()
    assert torch.equal(run(cache_implementation="static"), expected)
    assert torch.equal(run(cache_implementation="static"), expected)  # nothing is left over from the first time


def test_static_cache_forgets_the_image_before(model):
    for image in images(3):
        sequence = model.generate(image[None], do_sample=False, cache_implementation="static")
        assert trim(sequence[0]) == argmax_loop(model, [BOS], image, CONTEXT - 1)


def test_sizes_of_the_cache(model):
    outputs = model.generate(
        images(2), max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=3, return_dict_in_generate=True
    )
    cache = outputs[CACHE_NAME]
    assert isinstance(cache, CocaCache)
    assert len(cache.self_attention_cache) == UNIMODAL + MULTIMODAL
    assert len(cache.cross_attention_cache) == MULTIMODAL
    for layer in cache.self_attention_cache.layers:
        assert layer.keys.shape == (6, 4, 4, 8)  # beams, heads, tokens, width of a head
    for layer in cache.cross_attention_cache.layers:
        assert layer.keys.shape == (2, 4, NUM_QUERIES, 8)  # images
    static = model.generate(
        images(2), max_new_tokens=4, do_sample=False, cache_implementation="static", return_dict_in_generate=True
    )[CACHE_NAME]
    assert isinstance(static.self_attention_cache, StaticCache)
    assert [layer.keys.shape[2] for layer in static.cross_attention_cache.layers] == [NUM_QUERIES] * MULTIMODAL


def new_cache(kind: str, model):
    text_config = model.config.text_config
    if kind == "DynamicCache":
        return DynamicCache(config=text_config)
    if kind == "CocaCache":
        return CocaCache(DynamicCache(), DynamicCache())
    if kind == "StaticCache":
        return StaticCache(config=text_config, max_cache_len=CONTEXT)
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


@pytest.mark.parametrize("kind", ["DynamicCache", "EncoderDecoderCache", "CocaCache", "StaticCache"])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("eos", [False, True], ids=["open", "eos"])
def test_a_users_empty_cache(model, kind, kwargs, eos):
    """Changes nothing: neither the prompt's preparation nor the result."""
    ids, mask = pad([prompt + [EOS] * eos for prompt in PROMPTS], side="right" if eos else "left")
    inputs = {
        "pixel_values": images(3),
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
    }
    expected = model.generate(**inputs, **kwargs)
    assert torch.equal(model.generate(**inputs, **kwargs, **{CACHE_NAME: new_cache(kind, model)}), expected)
    # without a mask, too
    inputs["attention_mask"] = None
    assert torch.equal(model.generate(**inputs, **kwargs, **{CACHE_NAME: new_cache(kind, model)}), expected)


@pytest.mark.parametrize("again", [True, False], ids=["image_again", "no_image"])
@pytest.mark.parametrize("kind", ["own", "EncoderDecoderCache", "CocaCache"])
def test_continuing_from_a_cache(model, kind, again):
    expected = model.generate(images(2), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    cache = None if kind == "own" else new_cache(kind, model)
    first = model.generate(
        images(2),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        **{CACHE_NAME: cache},
    )
    second = model.generate(
        pixel_values=images(2) if again else None,
        input_ids=first.sequences,
        **{CACHE_NAME: first[CACHE_NAME] if kind == "own" else cache},
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(second, expected)


def test_continuing_a_dialogue(model):
    """More tokens than the model's own are appended between two calls."""
    first = model.generate(images(1), max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    second = model.generate(input_ids=ids, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=4, do_sample=False)
    assert second[0].tolist() == argmax_loop(model, ids[0].tolist(), images(1)[0], 4)


def test_forward_with_a_cache_step_by_step(model):
    ids = torch.tensor([[BOS, 7, 8, 9, 10], [BOS, 3, 4, 5, 6]])
    with torch.no_grad():
        expected = model(ids, images(2)).logits
        for cache in (None, DynamicCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())):
            outputs = model(ids[:, :2], images(2), cache=cache, use_cache=True)
            logits = [outputs.logits]
            for step in range(2, 5):
                outputs = model(ids[:, step : step + 1], cache=outputs[CACHE_NAME])
                logits.append(outputs.logits)
            torch.testing.assert_close(torch.cat(logits, dim=1), expected)
        assert model(ids, images(2), use_cache=False).get(CACHE_NAME) is None


def test_both_names_of_the_cache(model):
    """transformers 5.24 renamed `past_key_values` to `cache`."""
    ids = torch.tensor([[BOS, 7, 8, 9]])
    with torch.no_grad():
        expected = model(ids, images(1)).logits[:, -1:]
        for name in ("cache", "past_key_values"):
            seen = model(ids[:, :3], images(1), use_cache=True)[CACHE_NAME]
            torch.testing.assert_close(model(ids[:, 3:], **{name: seen}).logits, expected)
            with pytest.raises(ValueError, match="two names of the same thing"):
                model(ids[:, 3:], cache=seen, past_key_values=seen)


def test_text_embeddings_need_the_whole_text(model):
    with torch.no_grad():
        outputs = model(torch.tensor([[BOS, 7]]), images(1), use_cache=True)
        with pytest.raises(ValueError, match="without a `cache`"):
            model.model.text_model(torch.tensor([[8]]), cache=outputs[CACHE_NAME], output_embedding=True)


@pytest.mark.parametrize("chunk", [1, 2, 3, 10])
def test_prefill_in_chunks(model, chunk):
    ids, mask = pad([[BOS, 7, 8, 9, 10], [BOS, 11]])
    kwargs = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 4,
        "do_sample": False,
        "pixel_values": images(2),
    }
    expected = model.generate(**kwargs)
    assert torch.equal(model.generate(**kwargs, prefill_chunk_size=chunk), expected)


# ------------------------------------------------------------------------------------------------- other decoders


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: str(len(prompt)))
def test_assisted_decoding(model, prompt):
    ids = torch.tensor([prompt])
    kwargs = {"pixel_values": images(1), "input_ids": ids, "do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**kwargs)
    assert torch.equal(model.generate(**kwargs, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(**kwargs, assistant_model=model), expected)
    other = build(pooler_type="shared")  # another opinion
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert torch.equal(model.generate(**kwargs, assistant_model=other), expected)


def test_inputs_embeds(model):
    ids = torch.tensor([[BOS, 7, 8, 9]])
    embeds = model.get_input_embeddings()(ids).detach()
    for kwargs in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        expected = model.generate(pixel_values=images(1), input_ids=ids, max_new_tokens=5, do_sample=False, **kwargs)
        found = model.generate(
            pixel_values=images(1), inputs_embeds=embeds, max_new_tokens=5, do_sample=False, **kwargs
        )
        assert torch.equal(found, expected[:, 4:])
        both = model.generate(
            pixel_values=images(1), inputs_embeds=embeds, input_ids=ids, max_new_tokens=5, do_sample=False, **kwargs
        )
        assert torch.equal(both, expected)


@pytest.mark.parametrize("length", [{}, {"max_new_tokens": 40}, {"max_length": 40}], ids=["default", "new", "total"])
def test_inputs_embeds_stop_at_the_context(model, length):
    ids = torch.tensor([[BOS, 7, 8, 9]])
    embeds = model.get_input_embeddings()(ids).detach()
    expected = model.generate(pixel_values=images(1), input_ids=ids, do_sample=False, eos_token_id=None)
    assert expected.shape[1] == CONTEXT
    for more in ({}, {"cache_implementation": "static"}):
        found = model.generate(
            pixel_values=images(1), inputs_embeds=embeds, do_sample=False, eos_token_id=None, **length, **more
        )
        assert torch.equal(found, expected[:, 4:])


def test_scores_and_logits(model):
    kwargs = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    greedy = model.generate(images(2), do_sample=False, output_scores=True, **kwargs)
    with torch.no_grad():
        expected = model(greedy.sequences, images(2)).logits
    for step, logits in enumerate(greedy.logits):
        torch.testing.assert_close(logits.double(), expected[:, step], rtol=1e-5, atol=1e-5)
    assert len(greedy.scores) == 4
    beams = model.generate(images(2), do_sample=False, num_beams=3, output_scores=True, length_penalty=0.0, **kwargs)
    with torch.no_grad():
        logits = model(beams.sequences, images(2)).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(-1, beams.sequences[:, 1:, None])[..., 0].sum(-1)
    torch.testing.assert_close(beams.sequences_scores.double(), chosen, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions_while_generating():
    model = build()
    model.set_attn_implementation("eager")
    outputs = model.generate(
        images(2),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(outputs.hidden_states) == 3
    for step in range(3):
        assert [tuple(h.shape) for h in outputs.hidden_states[step]] == [(2, 1, 32)] * (UNIMODAL + MULTIMODAL + 1)
        assert [tuple(a.shape) for a in outputs.attentions[step]] == [(2, 4, 1, step + 1)] * (UNIMODAL + MULTIMODAL)
    with torch.no_grad():
        full = model(outputs.sequences, images(2), output_hidden_states=True).hidden_states
    for step in range(3):
        for layer, states in enumerate(outputs.hidden_states[step]):
            torch.testing.assert_close(states[:, 0], full[layer][:, step])


def test_generation_config_comes_from_the_text_config(model, tmp_path):
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)
    model.save_pretrained(tmp_path)
    loaded = CocaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.generate(images(2), do_sample=False), model.generate(images(2), do_sample=False))
    given = GenerationConfig(num_beams=3, do_sample=False, max_new_tokens=5)
    assert torch.equal(
        model.generate(images(2), generation_config=given),
        model.generate(images(2), num_beams=3, do_sample=False, max_new_tokens=5),
    )


def test_generating_leaves_the_model_as_it_was():
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model.generation_config.to_dict(), model.config.to_dict()
    model.generate(images(1), max_new_tokens=4, num_beams=2)
    model.generate(images(1), cache_implementation="static", max_new_tokens=4)
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------------------------- the context


@pytest.mark.parametrize(
    "length",
    [{}, {"max_new_tokens": 50}, {"max_length": 50}, {"max_new_tokens": CONTEXT}],
    ids=["default", "new", "total", "one_more"],
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
@pytest.mark.parametrize("prompt", [[BOS], [BOS, 7, 8]], ids=["no_prompt", "prompt"])
def test_generation_stops_at_the_context(model, length, kwargs, prompt):
    ids = torch.tensor([prompt])
    sequences = model.generate(
        pixel_values=images(1), input_ids=ids, do_sample=False, eos_token_id=None, **length, **kwargs
    )
    assert sequences.shape == (1, CONTEXT)


@pytest.mark.parametrize("length", [{"max_new_tokens": 3}, {"max_length": 4}], ids=["new", "total"])
def test_shorter_lengths_are_respected(model, length):
    assert model.generate(images(1), eos_token_id=None, **length).shape == (1, 4)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 3])
@pytest.mark.parametrize("kwargs", [{}, {"max_new_tokens": 2}], ids=["default", "max_new_tokens"])
def test_a_prompt_that_fills_the_context_is_refused(model, length, kwargs):
    ids = torch.full((1, length), 7)
    with pytest.raises(ValueError, match=f"`text_config.max_text_length`|{CONTEXT} tokens|{length} tokens"):
        model.generate(pixel_values=images(1), input_ids=ids, **kwargs)
    embeds = model.get_input_embeddings()(ids).detach()
    with pytest.raises(ValueError, match=f"`text_config.max_text_length`|{CONTEXT} tokens|{length} tokens"):
        model.generate(pixel_values=images(1), inputs_embeds=embeds, **kwargs)


def test_the_last_place_of_the_context_is_used(model):
    prompt = [BOS, *range(7, 7 + CONTEXT - 2)]
    assert len(prompt) == CONTEXT - 1
    sequence = model.generate(pixel_values=images(1), input_ids=torch.tensor([prompt]), do_sample=False)
    assert sequence[0].tolist() == argmax_loop(model, prompt, images(1)[0], 1)
    # a padded batch, whose padding takes places from nobody's context, ends when the longest is full
    full = torch.tensor([prompt, [PAD] * (CONTEXT - 2) + [BOS]])
    sequences = model.generate(pixel_values=images(2), input_ids=full, do_sample=False)
    assert sequences.shape == (2, CONTEXT)


# ------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="plain"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"max_new_tokens": 4}, id="max_new_tokens"),
        pytest.param({"max_length": 6}, id="max_length"),
        pytest.param({"do_sample": True, "num_return_sequences": 2, "top_p": 0.9}, id="samples"),
        pytest.param({"max_new_tokens": 50}, id="beyond_the_context"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"use_cache": False}, id="no_cache"),
        pytest.param({"return_dict_in_generate": True, "output_scores": True}, id="scores"),
        pytest.param({"input_ids": torch.tensor([[BOS, EOS, PAD], [BOS, 7, EOS]])}, id="right_padding"),
        pytest.param(
            {
                "input_ids": torch.tensor([[BOS, EOS, PAD], [BOS, 7, EOS]]),
                "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
            },
            id="right_padding_mask",
        ),
        pytest.param({"input_ids": torch.tensor([[BOS], [BOS]])}, id="bos"),
    ],
)
def test_nothing_is_warned_about(model, kwargs, complaints):
    model.generate(pixel_values=images(2), **kwargs)
    assert complaints() == []


def test_the_fixture_hears_warnings(model, complaints):
    model.generate(images(2), max_new_tokens=3, max_length=5)
    assert any("max_new_tokens" in message for message in complaints())


# ---------------------------------------------------------------------------------------------------------- compile


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="PyTorch 2.6 cannot trace transformers' decorators")
@pytest.mark.parametrize(
    ("backend", "kwargs"), [("aot_eager", {}), ("eager", {"num_beams": 2})], ids=["greedy-aot_eager", "beams-eager"]
)
def test_compiled_steps_equal_eager(backend, kwargs):
    model = build(text={"num_hidden_layers": 2, "num_multimodal_layers": 1})
    inputs = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9, "cache_implementation": "static", **kwargs}
    batches = images(4).split(2)
    expected = [model.generate(batch, **inputs) for batch in batches]
    graphs = []

    def compile_graph(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, backend=compile_graph, fullgraph=True)
    found = [model.generate(batch, **inputs) for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # one for the prompt, which also reads the image tokens, and one for all steps; the second call compiles nothing
    assert len(graphs) == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------- guidance


class TwoPasses(LogitsProcessor):
    """Guidance by its definition: a pass over the whole text without a cache, with the null image."""

    def __init__(self, model, scale, null_tokens, mask=None):
        self.model, self.scale, self.null_tokens, self.mask = model, scale, null_tokens, mask

    def __call__(self, input_ids, scores):
        mask = torch.ones_like(input_ids)
        if self.mask is not None:
            mask[:, : self.mask.shape[1]] = self.mask.repeat_interleave(len(mask) // len(self.mask), dim=0)
        tokens = self.null_tokens.expand(len(mask), -1, -1)
        logits = self.model(input_ids, attention_mask=mask, encoder_hidden_states=tokens, use_cache=False).logits
        null, given = logits[:, -1].float().log_softmax(-1), scores.log_softmax(-1)
        return null + self.scale * (given - null)


GUIDED = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}


@pytest.mark.parametrize("prompted", [False, True], ids=["bos", "prompts"])
@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 4}, id="beams"),
        pytest.param({"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0}, id="several_beams"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="sampling"),
        pytest.param({"do_sample": True, "num_beams": 3}, id="beam_sampling"),
        pytest.param({"use_cache": False, "num_beams": 3}, id="no_cache"),
        pytest.param({"cache_implementation": "static"}, id="static_cache"),
    ],
)
def test_guidance_equals_two_passes(model, kwargs, prompted):
    inputs, mask = {"pixel_values": images(3)}, None
    if prompted:
        ids, mask = pad(PROMPTS)
        inputs.update(input_ids=ids, attention_mask=mask)
    null_tokens = model.get_image_features(torch.zeros_like(images(1))).pooler_output
    kwargs = {"do_sample": False, **GUIDED, **kwargs}
    torch.manual_seed(1)
    guided = model.generate(**inputs, guidance_scale=2.5, no_repeat_ngram_size=2, **kwargs)
    torch.manual_seed(1)
    processors = [TwoPasses(model, 2.5, null_tokens, mask), NoRepeatNGramLogitsProcessor(2)]
    expected = model.generate(**inputs, **kwargs, logits_processor=LogitsProcessorList(processors))
    assert torch.equal(guided.sequences, expected.sequences)
    if kwargs.get("num_beams"):
        torch.testing.assert_close(guided.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    plain = model.generate(**inputs, **kwargs, no_repeat_ngram_size=2)
    assert not torch.equal(guided.sequences, plain.sequences)  # it does something


def test_guidance_follows_the_beams_with_its_cache(model, monkeypatch):
    """One token a step goes through the network, also where beams change places."""
    moves, find_rows = [], CocaGuidanceLogitsProcessor._find_rows

    def spy(self, texts):
        source = find_rows(self, texts)
        moves.append(None if source is None else source.tolist())
        return source

    monkeypatch.setattr(CocaGuidanceLogitsProcessor, "_find_rows", spy)
    lengths = []
    handle = model.text_decoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        model.generate(images(2), num_beams=4, do_sample=False, guidance_scale=2.0, max_new_tokens=8, eos_token_id=None)
    finally:
        handle.remove()
    assert lengths == [1] * 16  # two branches, eight tokens
    assert moves[0] is None and None not in moves[1:]
    assert any(move != list(range(8)) for move in moves[1:])


def test_guidance_goes_on_after_tokens_were_taken_back(model):
    null_tokens = model.get_null_image_tokens()
    cached, plain = CocaGuidanceLogitsProcessor(model, 2.0, null_tokens), TwoPasses(model, 2.0, null_tokens)
    scores = torch.randn(2, VOCABULARY)
    texts = [
        [[BOS, 3], [BOS, 4]],
        [[BOS, 3, 5], [BOS, 4, 6]],
        [[BOS, 3, 5, 7], [BOS, 4, 6, 8]],
        [[BOS, 3, 9], [BOS, 4, 6]],
        [[BOS, 3, 9, 1], [BOS, 3, 9, 2]],
        [[BOS, 3, 9, 1, 5]],
    ]
    for step in map(torch.tensor, texts):
        given = scores[: len(step)]
        torch.testing.assert_close(cached(step, given), plain(step, given), rtol=1e-5, atol=1e-5)


def test_guided_assisted_decoding(model):
    kwargs = {"do_sample": False, "guidance_scale": 1.5, "max_new_tokens": 8}
    expected = model.generate(images(1), **kwargs)
    assert torch.equal(model.generate(images(1), prompt_lookup_num_tokens=3, **kwargs), expected)
    assert torch.equal(model.generate(images(1), assistant_model=model, **kwargs), expected)


@pytest.mark.parametrize("prompt", [[BOS, 7, 8], [BOS, PAD, 8]])
def test_guidance_with_open_clips_mask(prompt):
    model = build(text={"shifted_cls_mask": True})
    kwargs = {**GUIDED, "do_sample": False, "guidance_scale": 2.0, "input_ids": torch.tensor([prompt])}
    kwargs["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    guided = model.generate(pixel_values=images(1), **kwargs)
    assert torch.equal(guided.sequences, model.generate(pixel_values=images(1), **kwargs, use_cache=False).sequences)


def test_guidance_of_1_is_none_and_leaves_the_config_alone(model):
    plain = model.generate(images(2), do_sample=False)
    assert torch.equal(model.generate(images(2), do_sample=False, guidance_scale=1.0), plain)
    config = GenerationConfig(guidance_scale=2.0, do_sample=False, max_new_tokens=4, eos_token_id=EOS, bos_token_id=BOS)
    once, twice = (model.generate(images(2), generation_config=config) for _ in range(2))
    assert torch.equal(once, twice) and config.guidance_scale == 2.0


def test_another_null_image(model):
    grey, noise = torch.zeros_like(images(1)), 3 * torch.randn_like(images(1))
    kwargs = {**GUIDED, "do_sample": False, "guidance_scale": 2.0}
    default = model.generate(pixel_values=images(2), **kwargs)
    given = [
        model.generate(null_image_tokens=model.get_null_image_tokens(), pixel_values=images(2), **kwargs),
        model.generate(
            pixel_values=images(2), null_image_tokens=model.get_image_features(grey).pooler_output, **kwargs
        ),
        model.generate(encoder_hidden_states=model.get_image_features(images(2)).pooler_output, **kwargs),
    ]
    for other in given:
        assert torch.equal(other.sequences, default.sequences)
    noisy = model.get_image_features(noise).pooler_output
    other = model.generate(pixel_values=images(2), null_image_tokens=noisy, **kwargs)
    assert not torch.allclose(other.scores[0], default.scores[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"null_image_tokens": torch.zeros(2, NUM_QUERIES, 40).double()}, "one null image, `null_image_tokens` hold 2"),
        ({"negative_prompt_ids": torch.tensor([[BOS]])}, "leave out `negative_prompt_ids`"),
        ({"inputs_embeds": torch.zeros(1, 2, 32).double()}, "prompt as `input_ids`"),
    ],
)
def test_guidance_errors(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(pixel_values=images(1), guidance_scale=2.0, **kwargs)


def test_an_encoder_without_a_size_needs_the_null_image():
    config = build().config
    config.vision_config = AutoConfig.for_model(
        "resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    model = CocaForConditionalGeneration(config).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    tokens = model.get_image_features(pixel_values).pooler_output
    with pytest.raises(ValueError, match=r"\('resnet'\) has no `image_size` of its own: give `null_image_tokens"):
        model.generate(encoder_hidden_states=tokens, guidance_scale=2.0)
    null_tokens = model.get_null_image_tokens(pixel_values)
    kwargs = {"guidance_scale": 2.0, "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(
        model.generate(encoder_hidden_states=tokens, null_image_tokens=null_tokens, **kwargs),
        model.generate(pixel_values=pixel_values, **kwargs),
    )


# ------------------------------------------------------------------------------------------------ scores of captions


@torch.no_grad()
def log_prob(model, text: list[int], image: torch.Tensor) -> float:
    """The definition: one text without padding, one image, token by token."""
    logits = model(torch.tensor([text]), image[None], use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[i, token]) for i, token in enumerate(text[1:]))


CAPTIONS = [[BOS, 7, EOS], [BOS, 9, 10, 11, 12, EOS], [BOS, 3, PAD, 5, EOS], [BOS, *range(21, 33), EOS]]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
def test_scores_of_every_image_and_text(model, batch_size, side, masked):
    ids, mask = pad(CAPTIONS, side)
    scores = model.score_captions(ids, images(3), mask if masked else None, batch_size=batch_size)
    expected = [[log_prob(model, text, image) for text in CAPTIONS] for image in images(3)]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("num_images", [1, 2, 4])
def test_scores_of_pairs(model, batch_size, num_images):
    ids, mask = pad(CAPTIONS, "right")
    scores = model.score_captions(ids, images(num_images), mask, pairs=True, batch_size=batch_size)
    every = model.score_captions(ids, images(num_images), mask)
    of_text = torch.arange(4) // (4 // num_images)
    torch.testing.assert_close(scores, every[of_text, torch.arange(4)])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_teacher_forced_scores_are_those_of_generate(model, num_beams):
    ids, mask = pad(PROMPTS)
    outputs = model.generate(
        pixel_values=images(3),
        input_ids=ids,
        attention_mask=mask,
        num_beams=num_beams,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # with beams the scores are normalised already, and those of finished beams are 0
    transitions = model.compute_transition_scores(
        outputs.sequences, outputs.scores, outputs.get("beam_indices"), normalize_logits=num_beams == 1
    )
    generated = outputs.sequences[:, ids.shape[1] :]
    ended = (generated == EOS).cumsum(-1) - (generated == EOS).long() > 0
    expected = transitions.masked_fill(ended, 0).sum(-1)
    mask = torch.cat([mask, (~ended).long()], dim=1)
    labels = outputs.sequences.clone()
    labels[:, : ids.shape[1]] = -100
    scores = model.score_captions(outputs.sequences, images(3), mask, labels=labels, pairs=True)
    torch.testing.assert_close(scores.float(), expected, rtol=1e-4, atol=1e-4)


def test_scores_are_minus_the_captioning_loss(model):
    ids, mask = pad(CAPTIONS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1] = -100  # not counted
    with torch.no_grad():
        loss = model(ids, images(4), mask, labels=labels).caption_loss
    scores = model.score_captions(ids, images(4), mask, labels=labels, pairs=True)
    assert -scores.sum().item() == pytest.approx(loss.item() * (labels[:, 1:] != -100).sum().item())


def test_language_prior(model):
    ids, mask = pad(CAPTIONS, "right")
    plain = model.score_captions(ids, images(3), mask)
    grey = torch.zeros(3, 8, 8).double()
    prior = torch.tensor([log_prob(model, text, grey) for text in CAPTIONS], dtype=torch.float64)
    for options in ({}, {"batch_size": 1}):
        scores = model.score_captions(ids, images(3), mask, language_prior=0.7, **options)
        torch.testing.assert_close(scores, plain - 0.7 * prior)
    paired = model.score_captions(ids, images(3)[:2], mask, language_prior=1, pairs=True)
    torch.testing.assert_close(paired, (plain - prior)[[0, 0, 1, 1], [0, 1, 2, 3]])
    # the mean of p(text) over several null images
    nulls = images(3)
    scores = model.score_captions(
        ids, images(3), mask, language_prior=1, null_image_tokens=model.get_image_features(nulls).pooler_output
    )
    torch.testing.assert_close(scores, plain - plain.exp().mean(0).log())
    assert scores.argmax(1).tolist() != plain.argmax(1).tolist()


def test_guided_score_of_a_text_is_its_score_with_a_language_prior(model):
    kwargs = {"guidance_scale": 3.0, "max_new_tokens": 6, "eos_token_id": None, "length_penalty": 0.0}
    outputs = model.generate(
        pixel_values=images(1), num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True, **kwargs
    )
    scores = model.score_captions(
        outputs.sequences, images(1), torch.ones_like(outputs.sequences), language_prior=2 / 3
    )
    torch.testing.assert_close(outputs.sequences_scores.double(), 3 * scores[0], rtol=1e-4, atol=1e-4)
    assert outputs.sequences.shape == (1, 7)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_scoring_reads_each_image_and_each_text_once(model, batch_size):
    cross_attn = model.text_decoder.layers[0].cross_block.cross_attn
    vision, keys, text = count_calls(model.model.vision_model, cross_attn.k_proj, model.model.text_model)
    ids, mask = pad(CAPTIONS + CAPTIONS[:3], "right")
    model.score_captions(ids, images(4), mask, batch_size=batch_size)
    assert [sum(shape[0] for shape in shapes) for shapes in (vision, keys, text)] == [4, 4, 7]
    assert max(shape[0] for shape in text) <= batch_size


def test_scores_of_other_image_inputs(model):
    ids, mask = pad(CAPTIONS, "right")
    scores = model.score_captions(ids, images(2), mask)
    features = model.get_image_features(images(2))
    for inputs in (
        {"image_hidden_states": features.last_hidden_state},
        {"encoder_hidden_states": features.pooler_output},
        {"pixel_values": images(2), "interpolate_pos_encoding": True},
    ):
        torch.testing.assert_close(model.score_captions(ids, attention_mask=mask, **inputs), scores)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "No image: give `pixel_values`"),
        ({"pixel_values": images(3), "pairs": True}, "3 images for 4 texts"),
        ({"pixel_values": images(1), "image_hidden_states": torch.zeros(1, 5, 24)}, "Give one of"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 24)}, "`encoder_hidden_states` must have shape"),
    ],
)
def test_scoring_errors(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.score_captions(pad(CAPTIONS)[0], **kwargs)


def test_scores_in_half_precision():
    model = build().float()
    ids, mask = pad(CAPTIONS, "right")
    expected = model.score_captions(ids, images(2).float(), mask, language_prior=0.5)
    scores = model.bfloat16().score_captions(ids, images(2).bfloat16(), mask, language_prior=0.5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.3)
