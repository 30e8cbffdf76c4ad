"""The evaluators: what they ask a model for, and what they do with it."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_coca import CocaForConditionalGeneration, CocaImageProcessorPil, CocaModel, CocaProcessor, CocaTokenizer
from modeling_coca.evaluation import (
    CaptioningEvaluator,
    QuestionAnsweringEvaluator,
    RetrievalEvaluator,
    ZeroShotClassificationEvaluator,
    caption_metrics,
)
from modeling_coca.training import CocaDataCollator, freeze

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def dataset():
    return datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(np.full((32, 32, 3), color, np.uint8)) for color in COLORS.values()],
            "text": [f"a {name} square" for name in COLORS],
            "label": list(range(4)),
            "question": ["what is it?", "color?", "what color is it, then?", "what?"],
            "answer": list(COLORS),
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=list(COLORS)),
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
            }
        ),
    )


@pytest.fixture(scope="module")
def processor(dataset):
    texts = [*dataset["text"], *dataset["question"]]
    tokenizer = CocaTokenizer(model_max_length=16).train_new_from_iterator(texts, vocab_size=512)
    return CocaProcessor(CocaImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), tokenizer)


@pytest.fixture
def model(tiny_config):
    return CocaForConditionalGeneration(tiny_config())


def overfit(model, processor, dataset, steps=150):
    """Learns the four captions and the four answers by heart."""
    rows = [{**row, "question": None} for row in dataset]
    rows += [{**row, "text": row["answer"]} for row in dataset]
    batch = CocaDataCollator(processor, prefix_column="question")(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    return model


def test_all_evaluators_see_that_a_model_has_learnt_its_data(model, processor, dataset):
    overfit(model, processor, dataset)
    retrieval = RetrievalEvaluator(processor, dataset, batch_size=3)(model)
    assert retrieval == dict.fromkeys(
        ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall"], 1.0
    )

    zero_shot = ZeroShotClassificationEvaluator(processor, dataset, templates=["a {} square"], per_class=True)(model)
    figures = ["top1", "top5", "mean_per_class", *(f"top1/{name}" for name in COLORS)]
    assert zero_shot == {f"zero_shot_{figure}": 1.0 for figure in figures}

    captioning = CaptioningEvaluator(processor, dataset, batch_size=3)
    assert captioning(model) == caption_metrics(dataset["text"], dataset["text"])
    assert captioning.predictions == dataset["text"]

    # prompts of unequal length in one batch
    answering = QuestionAnsweringEvaluator(processor, dataset, batch_size=3)
    assert answering(model) == {"answer_accuracy": 1.0}
    assert answering.predictions == list(COLORS)
    several = dataset.remove_columns("answer").add_column("answer", [[name] * 9 + ["no"] for name in COLORS])
    assert QuestionAnsweringEvaluator(processor, several)(model) == {"answer_accuracy": 1.0, "vqa_accuracy": 1.0}


def test_names_are_put_before_the_figures(model, processor, dataset):
    evaluator = RetrievalEvaluator(processor, dataset, name="test", ks=(1,))
    assert evaluator.primary_metric == "test_mean_recall"
    assert set(evaluator(model)) == {"test_i2t_r1", "test_t2i_r1", "test_mean_recall"}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_dual_encoder_features_and_batches_give_the_same(model, processor, dataset, batch_size):
    model.eval()
    options = {"ks": (1, 2), "batch_size": batch_size}
    expected = RetrievalEvaluator(processor, dataset, ks=(1, 2))(model)
    assert RetrievalEvaluator(processor, dataset, **options)(model) == expected
    dual: CocaModel = model.model
    assert RetrievalEvaluator(processor, dataset, **options)(dual) == expected
    with torch.no_grad():
        pixel_values = processor.image_processor(list(dataset["image"]), return_tensors="pt")["pixel_values"]
        features = dual.vision_model(pixel_values).last_hidden_state.numpy()
    rows = dataset.remove_columns("image").add_column("f", [f.tolist() for f in features])
    assert RetrievalEvaluator(processor, rows, image_hidden_states_column="f", **options)(model) == expected
    captions = CaptioningEvaluator(processor, dataset)
    of_features = CaptioningEvaluator(processor, rows, image_hidden_states_column="f", batch_size=batch_size)
    assert captions(model) == of_features(model)
    assert captions.predictions == of_features.predictions


class Lookup(RetrievalEvaluator):
    """Embeddings that the test has chosen, instead of a model's."""

    def encode_images(self, model, dataset=None):
        return torch.tensor([row["image"] for row in (self.dataset if dataset is None else dataset)])

    def encode_texts(self, model, texts):
        self.texts = list(texts)
        return torch.tensor([self.embeds[text] for text in texts])


def test_several_captions_and_equal_captions_by_hand():
    rows = [
        {"image": [1.0, 0.0, 0.0], "text": ["a", "b"]},
        {"image": [0.0, 1.0, 0.0], "text": ["b", "b"]},  # one text, which the first image has, too
        {"image": [0.0, 0.0, 1.0], "text": "c"},
        {"image": [0.0, 0.6, 0.8], "text": None},  # a candidate only
    ]
    evaluator = Lookup(None, rows, ks=(1, 2), extra_texts=["a", "d"], extra_images=rows[:1])
    evaluator.embeds = {
        "a": [0.9, 0.1, 0.0],
        "b": [0.1, 0.3, 0.8],
        "c": [0.0, 0.5, 0.4],
        "d": [2.0, 0.0, 0.7],
    }
    figures = evaluator(torch.nn.Identity())
    assert evaluator.texts == ["a", "b", "c", "d"]
    # image 0 finds a. image 1: b .3 behind c .5. image 2: c .4 behind b .8
    assert figures["i2t_r1"] == pytest.approx(1 / 3)
    assert figures["i2t_r2"] == 1.0
    # a: image 0. b: .1 and .3 behind image 2 (.8) and image 3 (.82). c: .4 behind image 1 (.5) and image 3 (.62)
    assert figures["t2i_r1"] == pytest.approx(1 / 3)
    assert figures["t2i_r2"] == pytest.approx(1 / 3)
    assert figures["mean_recall"] == pytest.approx((1 / 3 + 1 + 1 / 3 + 1 / 3) / 4)
    # with "d", image 0 finds it first (2 before .9), image 2 has b .8, d .7, c .4
    assert figures["i2t_r1_all"] == 0.0
    assert figures["i2t_r2_all"] == pytest.approx(2 / 3)
    # a second picture of "a" and "b" is right for them as well
    assert figures["t2i_r1_all"] == pytest.approx(1 / 3)


def test_zero_shot_averages_normalised_templates(model, processor, dataset):
    model.eval()
    templates = ["a {} square", lambda name: f"it is {name}"]
    evaluator = ZeroShotClassificationEvaluator(processor, dataset, templates=templates)
    with torch.no_grad():
        weights = evaluator.class_embeddings(model)
        ids = processor.tokenizer(["a green square", "it is green"], padding=True, return_tensors="pt")
        embeds = model.get_text_features(**ids).pooler_output
    embeds = torch.nn.functional.normalize(embeds, dim=-1).mean(0)
    assert torch.allclose(weights[2], embeds / embeds.norm(), atol=1e-6)
    by_name = dataset.remove_columns("label").add_column("label", list(COLORS))
    named = ZeroShotClassificationEvaluator(processor, by_name, class_names=list(COLORS), templates=templates)
    assert named(model) == evaluator(model)


def test_modes_are_restored(model, processor, dataset):
    freeze(model, "vision_model")
    model.train()
    model.text_decoder.eval()  # by hand
    before = [module.training for module in model.modules()]
    CaptioningEvaluator(processor, dataset)(model)
    assert [module.training for module in model.modules()] == before
    broken = RetrievalEvaluator(processor, dataset, text_column="caption")
    with pytest.raises(ValueError, match=r"no column 'caption' \(`text_column`\), only 'image', 'text'"):
        broken(model)
    assert [module.training for module in model.modules()] == before


def test_wrapped_models(model, processor, dataset, tmp_path):
    evaluator = CaptioningEvaluator(processor, dataset)
    expected = evaluator(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert evaluator(torch.nn.parallel.DistributedDataParallel(model)) == expected
    finally:
        torch.distributed.destroy_process_group()
    assert evaluator(torch.compile(model)) == expected


def test_a_transform_of_the_data_set_is_kept_for_images_only(model, processor, dataset):
    transformed = dataset.select(range(4))
    transformed.set_transform(lambda rows: {"image": [image.rotate(90) for image in rows["image"]]})  # no text
    assert RetrievalEvaluator(processor, transformed)(model) == RetrievalEvaluator(processor, dataset)(model)


def test_errors_name_the_option(model, processor, dataset):
    with pytest.raises(ValueError, match="`dataset` is empty"):
        RetrievalEvaluator(processor, [])
    with pytest.raises(ValueError, match=r"no column 'picture' \(`image_column`\)"):
        RetrievalEvaluator(processor, dataset, image_column="picture")(model)
    with pytest.raises(ValueError, match="pass `class_names`"):
        ZeroShotClassificationEvaluator(processor, dataset, label_column="answer")
    with pytest.raises(ValueError, match="`templates` needs"):
        ZeroShotClassificationEvaluator(processor, dataset, templates=["a photo"])
    with pytest.raises(ValueError, match="not in `class_names`: 'blue'"):
        ZeroShotClassificationEvaluator(
            processor, dataset, label_column="answer", class_names=["red", "green", "white"]
        )(model)
    with pytest.raises(ValueError, match="needs a model that writes"):
        CaptioningEvaluator(processor, dataset)(model.model)
    with pytest.raises(ValueError, match=r"Rows \[1\] have no caption"):
        CaptioningEvaluator(processor, [dataset[0], {**dataset[1], "text": None}])(model)
    with pytest.raises(ValueError, match=r"Rows \[0\] have no answer"):
        QuestionAnsweringEvaluator(processor, [{**dataset[0], "answer": []}])(model)
    long = [{**dataset[0], "text": "red " * 30}]
    with pytest.raises(ValueError, match="limit is 16"):
        RetrievalEvaluator(processor, long)(model)
    assert RetrievalEvaluator(processor, long, truncation=True)(model)["i2t_r1"] == 1.0
