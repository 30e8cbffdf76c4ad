"""Attention maps: they are the product of the weights that the network used, and lie where the image tells the word."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_coca import (
    CocaConfig,
    CocaForConditionalGeneration,
    CocaForVisualQuestionAnswering,
    CocaImageProcessor,
    CocaModel,
    CocaProcessor,
    CocaTokenizer,
)
from modeling_coca.visualization import AttentionMaps, attention_maps, draw_maps, word_maps

BOS, EOS = 1, 2
ROWS, COLUMNS = 2, 3


def build(cls=CocaForConditionalGeneration, vision=None, **kwargs):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = CocaConfig(
        vision_config={**small, "num_hidden_layers": 1, "image_size": [8, 12], "patch_size": 4, **(vision or {})},
        text_config={
            **small,
            "num_hidden_layers": 3,
            "num_multimodal_layers": 2,
            "vocab_size": 40,
            "max_position_embeddings": 12,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": 0,
        },
        **{"projection_dim": 8, "num_query_tokens": 5, "num_pooler_attention_heads": 4, **kwargs},
    )
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def weights_by_hand(attention, queries: torch.Tensor, keys: torch.Tensor, heads: int) -> torch.Tensor:
    """(queries, keys): softmax of the scaled products, one head after another, averaged."""
    queries, keys = attention.q_proj(queries), attention.k_proj(keys)
    size = queries.shape[-1] // heads
    parts = [slice(size * h, size * (h + 1)) for h in range(heads)]
    return torch.stack([F.softmax(queries[:, p] @ keys[:, p].T / size**0.5, dim=-1) for p in parts]).mean(0)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pooler", "encoder", "embedding"])
@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared"])
def test_pooler_maps_by_hand(pooler_type, norm):
    model = build(pooler_type=pooler_type, image_layer_norm=norm)
    pooler = model.model.image_pooler
    maps = attention_maps(model, images(2))
    assert maps.tokens is None
    for row in range(2):
        states = model.model.vision_model(images(2)[row, None]).last_hidden_state[0]
        if norm == "encoder":
            states = pooler.layer_norm(states)

        def look(part, states):
            return weights_by_hand(part.attn, part.layer_norm_q(part.query), part.layer_norm_k(states), heads=4)

        queries = look(pooler.caption_pooler, states)
        if pooler_type == "cascade":
            embedding = look(pooler.contrastive_pooler, pooler.caption_pooler(states[None])[0][0]) @ queries
        elif pooler_type == "parallel":
            embedding = look(pooler.contrastive_pooler, states)
        else:
            embedding, queries = queries[:1], queries[1:]
        # the first token is the class token, which is no place
        torch.testing.assert_close(maps.queries[row], queries[:, 1:].view(5, ROWS, COLUMNS))
        torch.testing.assert_close(maps.embedding[row], embedding[0, 1:].view(ROWS, COLUMNS))


@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared", "none"])
def test_token_maps_are_what_generate_looked_at(pooler_type):
    model = build(pooler_type=pooler_type)
    model.set_attn_implementation("eager")
    outputs = model.generate(
        images(2), max_new_tokens=6, eos_token_id=None, output_attentions=True, return_dict_in_generate=True
    )
    maps = attention_maps(model, images(2), outputs.sequences)
    assert maps.tokens.shape == (2, 7, ROWS, COLUMNS)
    assert not maps.tokens[:, 0].any()  # nobody wrote BOS
    with torch.no_grad():
        written = model(outputs.sequences, images(2), output_attentions=True).cross_attentions
    for step in range(6):
        cross = torch.stack([layer[:, :, step].mean(1) for layer in written]).mean(0)  # [B, Q]
        if pooler_type == "none":
            expected = cross.view(2, ROWS, COLUMNS)
        else:
            expected = torch.einsum("bq,bqhw->bhw", cross, maps.queries)
        torch.testing.assert_close(maps.tokens[:, step + 1], expected)
    total = maps.tokens[:, 1:].sum((-1, -2))
    assert (total <= 1 + 1e-5).all()
    if pooler_type == "none":
        torch.testing.assert_close(total, torch.ones_like(total))


def test_layouts_without_a_query_for_the_embedding():
    assert attention_maps(build(pooler_type="shared", image_pooling="mean"), images(1)).embedding is None
    maps = attention_maps(build(pooler_type="none"), images(1))
    assert maps == AttentionMaps(None, None, None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_map(side):
    model = build()
    text = torch.tensor([[BOS, 7, 8, EOS]])
    alone = attention_maps(model, images(1), text).tokens
    padding = (2, 0) if side == "left" else (0, 2)
    ids, mask = F.pad(text, padding), F.pad(torch.ones_like(text), padding)
    padded = attention_maps(model, images(1), ids, mask).tokens[:, padding[0] : padding[0] + 4]
    torch.testing.assert_close(padded[:, 1:], alone[:, 1:])


def test_the_model_is_left_as_it_was():
    model = build()
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    expected = model(torch.tensor([[BOS, 7]]), images(1)).logits
    with pytest.raises(ValueError):
        attention_maps(model, images(1), torch.zeros(1, 30, dtype=torch.long))
    attention_maps(model, images(1), torch.tensor([[BOS, 7]]))
    config = model.config
    assert [c._attn_implementation for c in (config, config.text_config, config.vision_config)] == [
        "eager",
        "sdpa",
        "eager",
    ]
    assert model.text_decoder.config._attn_implementation == "sdpa"
    assert torch.equal(model(torch.tensor([[BOS, 7]]), images(1)).logits, expected)


def test_other_models():
    dual = build(CocaModel)
    assert attention_maps(dual, images(2)).queries.shape == (2, 5, ROWS, COLUMNS)
    with pytest.raises(ValueError, match="a model with a decoder, not a CocaModel"):
        attention_maps(dual, images(1), torch.tensor([[BOS, 7]]))
    # a question is read, token by token, and none is written
    answerer = build(CocaForVisualQuestionAnswering)
    maps = attention_maps(answerer, images(1), torch.tensor([[BOS, 7, EOS]]))
    assert (maps.tokens[0].sum((-1, -2)) > 0).all()


def test_other_image_sizes_and_encoders():
    model = build()
    assert attention_maps(model, torch.randn(1, 3, 12, 8), interpolate_pos_encoding=True).queries.shape[-2:] == (3, 2)
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = CocaConfig(
        vision_config={**resnet, "layer_type": "basic"}, text_config=model.config.text_config, num_query_tokens=5
    )
    config.num_pooler_attention_heads = 4
    model = CocaForConditionalGeneration(config).eval()
    maps = attention_maps(model, torch.randn(1, 3, 32, 64))  # stride 8
    assert maps.queries.shape == (1, 5, 4, 8)
    torch.testing.assert_close(maps.queries.sum((-1, -2)), torch.ones(1, 5))


# --------------------------------------------------------------------------------------------- a place tells the word


COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


@pytest.fixture(scope="module")
def processor() -> CocaProcessor:
    # Merges by hand: learned ones differ from run to run where pairs are equally frequent, and with them what is trained here
    merges = []
    for word in ("dot", *COLOURS):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(pieces[:i]), pieces[i]) for i in range(1, len(pieces))]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<pad>", *letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<start_of_text>", "<end_of_text>"]
    tokenizer = CocaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, pad_token="<pad>", model_max_length=23
    )
    return CocaProcessor(CocaImageProcessor(size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3), tokenizer)


@pytest.fixture(scope="module")
def dots(processor) -> CocaForConditionalGeneration:
    """Trained on grey pictures of 4 x 4 patches, one of which has a colour."""
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = CocaConfig(
        # without layers a patch knows of itself alone
        vision_config={**small, "num_hidden_layers": 0, "image_size": 16, "patch_size": 4, "use_class_token": False},
        text_config={
            **small,
            "num_hidden_layers": 2,
            "num_multimodal_layers": 1,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=16,
        num_query_tokens=4,
        num_pooler_attention_heads=2,
        contrastive_loss_weight=0.0,
    )
    model = CocaForConditionalGeneration(config).train()
    ids = tokenizer([f"a {colour} dot" for colour in COLOURS], padding=True, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(160):
        colours, places = torch.randint(3, (32,)), torch.randint(16, (32,))
        loss = model(
            ids[colours],
            torch.stack([dot(c, p) for c, p in zip(colours.tolist(), places.tolist(), strict=True)]),
            labels=ids[colours],
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model.eval()


def dot(colour: int, place: int) -> torch.Tensor:
    image = torch.zeros(3, 16, 16)
    y, x = divmod(place, 4)
    image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = torch.tensor(list(COLOURS.values())[colour])[:, None, None]
    return image


def picture(colour: int, place: int) -> Image.Image:
    return Image.fromarray(((dot(colour, place) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def test_maps_lie_where_the_dot_is(dots, processor):
    found = []
    for colour, name in enumerate(COLOURS):
        ids = processor.tokenizer([f"a {name} dot"] * 16, return_tensors="pt")["input_ids"]
        maps = attention_maps(dots, torch.stack([dot(colour, place) for place in range(16)]), ids).tokens
        found.append(int((maps[:, 2].flatten(1).argmax(1) == torch.arange(16)).sum()))
    # one colour may be told by the absence of the others
    assert sorted(found)[1] >= 14 and max(found) == 16

    colour = found.index(16)
    maps = word_maps(dots, processor, picture(colour, 6), do_sample=False)
    assert maps.words == ["a", list(COLOURS)[colour], "dot"]
    assert maps.maps.shape == (3, 4, 4) and maps.maps[1].argmax() == 6
    assert maps.draw(panel_size=50).size == (150, 78)


def test_words_of_several_tokens_have_one_map(dots, processor):
    text = "a somewhat blue dot"
    maps = word_maps(dots, processor, picture(0, 5), text=text)
    assert maps.words == text.split()
    tokens = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokens.shape[1] > 6  # BOS, EOS, and some word in pieces
    pixel_values = processor(images=[picture(0, 5)], return_tensors="pt")["pixel_values"]
    each = attention_maps(dots, pixel_values, tokens).tokens[0]
    pieces = processor.tokenizer.convert_ids_to_tokens(tokens[0])
    ends = [i for i, piece in enumerate(pieces) if piece.endswith("</w>")]
    for word, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        torch.testing.assert_close(torch.tensor(maps.maps[word]), each[first + 1 : last + 1].mean(0))


def test_a_text_that_fills_the_context(dots, processor):
    """The end of a text, for which there is no room, is no word."""
    limit = dots.config.text_config.max_text_length
    text = " ".join(["a"] * (limit - 1))  # and BOS
    assert len(processor.tokenizer(text, verbose=False)["input_ids"]) == limit + 1
    maps = word_maps(dots, processor, picture(0, 5), text=text)
    assert len(maps.words) == len(maps.maps) == limit - 1 and maps.text == text
    with pytest.raises(ValueError, match="shorten the text"):
        word_maps(dots, processor, picture(0, 5), text=text + " a")


def test_the_image_is_the_one_that_the_model_saw(dots, processor):
    wide = Image.new("RGB", (64, 32), (200, 100, 50))
    maps = word_maps(dots, processor, wide, text="a red dot")
    assert maps.image.size == (16, 16)
    assert np.abs(np.asarray(maps.image).astype(int) - (200, 100, 50)).max() <= 1


# ------------------------------------------------------------------------------------------------------------ drawing


def test_panels():
    maps = np.zeros((7, 4, 4))
    maps[np.arange(7), np.arange(7) // 4, np.arange(7) % 4] = 0.2  # a map's own scale: small values show too
    drawn = draw_maps(Image.new("RGB", (40, 20), "gray"), maps, list("abcdefg"), panel_size=80)
    assert drawn.size == (6 * 80, 2 * (40 + 28))
    pixels = np.asarray(drawn).astype(int)
    for i in range(7):
        y, x = (i // 6) * 68, (i % 6) * 80
        panel = pixels[y : y + 40, x : x + 80].sum(-1).reshape(4, 10, 4, 20).mean((1, 3))
        assert panel.argmax() == i  # hot is bright
        label = pixels[y + 40 : y + 68, x : x + 80]
        assert label.min() < 100 and label.max() == 255
    assert (pixels[68:, 80:] == 255).all()  # no panel there


def test_panels_of_even_maps_and_long_words():
    drawn = draw_maps(
        Image.new("RGB", (20, 20)), torch.full((2, 3, 3), 0.1), ["w" * 60, "x"], columns=1, panel_size=100
    )
    assert drawn.size == (100, 256)
    pixels = np.asarray(drawn)
    assert (pixels[100:128, :2] == 255).all() and (pixels[100:128, -2:] == 255).all()  # the word fits
    for maps, labels in ((np.zeros((2, 3, 3)), ["a"]), (np.zeros((0, 3, 3)), [])):
        with pytest.raises(ValueError, match=f"There are {len(maps)} `maps` for {len(labels)} `labels`"):
            draw_maps(Image.new("RGB", (20, 20)), maps, labels)
