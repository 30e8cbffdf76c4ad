import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_coca import CocaForConditionalGeneration, CocaImageProcessorPil, CocaModel, CocaProcessor, CocaTokenizer
from modeling_coca.training import CocaDataCollator


@pytest.fixture(scope="module")
def processor():
    texts = ["a red square on white", "a blue square", "what color is it? it is red", "yes no two"] * 5
    tokenizer = CocaTokenizer(model_max_length=16).train_new_from_iterator(texts, vocab_size=512)
    return CocaProcessor(CocaImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), tokenizer)


def image(color=(255, 0, 0)):
    return Image.fromarray(np.full((40, 36, 3), color, np.uint8))


def test_captions_are_padded_on_the_right_and_labelled_but_for_padding(processor):
    batch = CocaDataCollator(processor)([{"image": image(), "text": t} for t in ("a red square on white", "a blue")])
    long, short = (processor.tokenizer(t)["input_ids"] for t in ("a red square on white", "a blue"))
    padding = len(long) - len(short)
    assert padding > 0
    assert batch["input_ids"].tolist() == [long, short + [processor.tokenizer.pad_token_id] * padding]
    assert batch["attention_mask"].tolist() == [[1] * len(long), [1] * len(short) + [0] * padding]
    assert batch["labels"].tolist() == [long, short + [-100] * padding]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    expected = processor.image_processor(image(), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][:1], expected)


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (4, 8), (8, 8), (100, 16)])
def test_pad_to_multiple_of_stays_within_the_context(processor, multiple, length):
    batch = CocaDataCollator(processor, pad_to_multiple_of=multiple)([{"image": image(), "text": "a red square"}])
    assert batch["input_ids"].shape == (1, length)


def test_a_prefix_has_the_tokens_of_a_prompt_and_no_loss(processor, tiny_config):
    row = {"image": image(), "q": "What color is it?", "a": "red"}
    batch = CocaDataCollator(processor, prefix_column="q", text_column="a")([row])
    tokenizer = processor.tokenizer
    prompt = tokenizer("What color is it?")["input_ids"][:-1]
    answer = tokenizer("red")["input_ids"][1:]
    assert answer[-1] == tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist() == prompt + answer
    assert batch["labels"][0].tolist() == [-100] * len(prompt) + answer
    # words are not joined across the boundary
    assert batch["input_ids"][0].tolist() == tokenizer("what color is it? red")["input_ids"]
    # the prompt that `generate` goes on from
    model = CocaForConditionalGeneration(tiny_config(text_config={"vocab_size": len(tokenizer)})).eval()
    inputs = tokenizer(["What color is it?"], return_tensors="pt")
    sequences = model.generate(**inputs, pixel_values=batch["pixel_values"], max_new_tokens=1, do_sample=False)
    assert sequences[0, : len(prompt)].tolist() == prompt


def test_rows_without_prefix_are_captions_and_only_they_are_pairs(processor):
    rows = [{"image": image(), "q": q, "text": "red"} for q in ("what color is it?", None, "")]
    batch = CocaDataCollator(processor, prefix_column="q")(rows)
    assert batch["contrastive_mask"].tolist() == [False, True, True]
    caption = processor.tokenizer("red")["input_ids"]
    assert batch["labels"][1, : len(caption)].tolist() == caption
    assert "contrastive_mask" not in CocaDataCollator(processor, prefix_column="q", contrast_prefixed=True)(rows)


def test_too_long_texts_are_errors_or_cut(processor):
    long = "red " * 30
    rows = [{"image": image(), "text": long}]
    with pytest.raises(ValueError, match="limit is 16"):
        CocaDataCollator(processor)(rows)
    cut = CocaDataCollator(processor, truncation=True)(rows)["input_ids"][0]
    assert len(cut) == 16
    assert cut[-1] == processor.tokenizer.eos_token_id

    rows = [{"image": image(), "q": "red " * 13, "text": "blue square"}]
    with pytest.raises(ValueError, match="tokens, and the limit is 16"):
        CocaDataCollator(processor, prefix_column="q")(rows)
    batch = CocaDataCollator(processor, prefix_column="q", truncation=True)(rows)
    answer = processor.tokenizer("blue square")["input_ids"][1:]
    assert batch["input_ids"].shape == (1, 16)
    assert batch["labels"][0].tolist() == [-100] * (16 - len(answer)) + answer


def test_one_of_several_captions_is_taken(processor):
    captions = ["red", "blue", "two", "yes"]
    row = {"image": image(), "text": captions}

    def taken(collator):
        ids = collator([row])["input_ids"]
        return processor.tokenizer.batch_decode(ids, skip_special_tokens=True)[0]

    assert taken(CocaDataCollator(processor, caption_choice="first")) == "red"
    assert {taken(CocaDataCollator(processor)) for _ in range(100)} == set(captions)

    def epochs(seed):
        collator = CocaDataCollator(processor, seed=seed)
        choices = []
        for epoch in range(40):
            collator.set_epoch(epoch)
            choices.append(taken(collator))
            assert taken(collator) == choices[-1]
        return choices

    assert epochs(0) == epochs(0) != epochs(1)
    assert set(epochs(0)) == set(captions)
    with pytest.raises(ValueError, match="caption_choice"):
        CocaDataCollator(processor, caption_choice="last")


def test_persistent_workers_hear_of_the_epoch(processor):
    collator = CocaDataCollator(processor)
    rows = [{"image": image(), "text": ["red", "blue", "two", "yes"]}] * 2
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, collate_fn=collator, num_workers=1, persistent_workers=True
    )
    seen = set()
    for epoch in range(8):
        collator.set_epoch(epoch)
        (batch,) = loader
        assert batch["input_ids"].tolist() == collator(rows)["input_ids"].tolist()
        seen.add(batch["input_ids"][0, 1].item())
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"picture": 0, "text": "red"}, {}, r"no column 'image' \(`image_column`\), only 'picture', 'text'.*unused"),
        ({"image": 0}, {"text_column": "caption"}, r"no column 'caption' \(`text_column`\)"),
        ({"image": 0, "text": None}, {}, r"no value in column 'text'"),
        ({"image": 0, "text": []}, {}, r"'text' \(`text_column`\) must hold a caption"),
        ({"image": 0, "text": "red"}, {"prefix_column": "q"}, r"no column 'q' \(`prefix_column`\)"),
        ({"image": 0, "text": "red", "q": 3}, {"prefix_column": "q"}, r"'q' \(`prefix_column`\) must hold texts"),
        ({"text": "red"}, {"image_hidden_states_column": "f"}, r"no column 'f' \(`image_hidden_states_column`\)"),
    ],
)
def test_errors_name_the_column_and_the_option(processor, row, options, message):
    row = {k: image() if v == 0 else v for k, v in row.items()}
    with pytest.raises(ValueError, match=message):
        CocaDataCollator(processor, **options)([row])


def test_features_of_a_frozen_encoder_instead_of_images(processor):
    features = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float16)
    dataset = datasets.Dataset.from_dict({"f": list(features), "text": ["red", "blue"]})
    collator = CocaDataCollator(processor, image_hidden_states_column="f")
    batch = collator([dataset[0], dataset[1]])  # nested lists
    assert batch["image_hidden_states"].dtype == torch.float32
    assert "pixel_values" not in batch
    assert np.array_equal(batch["image_hidden_states"].numpy(), features.astype(np.float32))
    batch = collator([{"f": f, "text": "red"} for f in torch.from_numpy(features)])
    assert batch["image_hidden_states"].dtype == torch.float16


def test_set_transform_may_give_images_or_finished_tensors(processor):
    dataset = datasets.Dataset.from_dict(
        {"image": [image(), image((0, 0, 255))], "text": ["red", "blue"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    collator = CocaDataCollator(processor)
    plain = collator([dataset[0], dataset[1]])
    dataset.set_transform(lambda rows: {**rows, "image": [i.rotate(180) for i in rows["image"]]})
    assert torch.equal(collator([dataset[0], dataset[1]])["pixel_values"], plain["pixel_values"])  # of one colour
    dataset.set_transform(
        lambda rows: {"text": rows["text"], "pixel_values": [torch.ones(3, 8, 8)] * len(rows["text"])}
    )
    assert torch.equal(collator([dataset[0], dataset[1]])["pixel_values"], torch.ones(2, 3, 8, 8))


def test_return_loss_is_for_the_dual_encoder(processor, tiny_config):
    rows = [{"image": image(), "text": "red"}, {"image": image((0, 0, 255)), "text": "a blue square"}]
    batch = CocaDataCollator(processor, return_loss=True)(rows)
    assert "labels" not in batch
    model = CocaModel(tiny_config(text_config={"vocab_size": len(processor.tokenizer)}))
    assert model(**batch).loss.item() > 0
