"""transformers' pipelines and CoCa's own, on tiny models. Whatever a test here calls must do so in silence."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from modeling_coca import (
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaImageCaptioningPipeline,
    CocaImageProcessorPil,
    CocaModel,
    CocaProcessor,
    CocaTokenizer,
    CocaVisualQuestionAnsweringPipeline,
)

TEXTS = ["a red square", "a green square", "what is it?", "a photo of a blue square."]
ANSWERS = ["yes", "no", "red", "green", "blue", "two"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
STOCK_GREEDY = {"generate_kwargs": GREEDY}  # the stock pipeline takes other arguments for the processor's


@pytest.fixture(scope="module")
def processor(tiny_config):
    # Bytes only: learned merges would be others in each run, and the model's words with them
    tokenizer = CocaTokenizer(model_max_length=32).train_new_from_iterator(TEXTS, vocab_size=450, min_frequency=99)
    return CocaProcessor(CocaImageProcessorPil(size=tiny_config().vision_config.image_size), tokenizer)


@pytest.fixture(scope="module")
def config(tiny_config, processor):
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 33}
    return lambda **changes: tiny_config(text_config={**size, **ids}, **changes)


def saved(model_class, config, processor, folder):
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():  # far from uniform scores
        parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(config, processor, tmp_path_factory):
    return saved(CocaForConditionalGeneration, config(), processor, tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def answers_folder(config, processor, tmp_path_factory):
    config = config(id2label=dict(enumerate(ANSWERS)), label2id={a: i for i, a in enumerate(ANSWERS)})
    return saved(CocaForVisualQuestionAnswering, config, processor, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def model(folder):
    return CocaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture(autouse=True)
def silence(capfd, recwarn):
    """Fails a test that logs, warns, or writes to stdout or stderr; progress bars are switched off."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in (None, "transformers", "huggingface_hub", "modeling_coca")]
    transformers_logging.warning_once.cache_clear()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.addHandler(handler)
    capfd.readouterr()
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    transformers_logging.enable_progress_bar()
    assert [record.getMessage() for record in records] == []
    assert [str(warning.message) for warning in recwarn] == []
    assert capfd.readouterr() == ("", "")


def caption(model, processor, image, prompt=None, **kwargs):
    """The text, prompt included, without a pipeline."""
    inputs = processor(images=[image], return_tensors="pt")
    if prompt is not None:
        inputs |= processor.tokenizer([prompt], return_tensors="pt")
    return processor.batch_decode(model.generate(**inputs, **{**GREEDY, **kwargs}), skip_special_tokens=True)[0]


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


# ------------------------------------------------------------------------------------------------- image-text-to-text


def test_captioning(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=folder)
    for image in images:
        (output,) = captioner(image, text="", **STOCK_GREEDY)
        assert output["generated_text"] == caption(model, processor, image)
    batch = captioner(images, text=["", ""], batch_size=2, **STOCK_GREEDY)
    assert [output["generated_text"] for output in batch] == [caption(model, processor, image) for image in images]


def test_captions_end_with_the_context_where_no_length_is_given(folder, processor, images):
    (output,) = pipeline("image-text-to-text", model=folder)(images[0], text="", return_tensors=True)
    assert 1 < len(output["generated_token_ids"]) <= 32


def test_prompts(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=folder)
    prompts = ["what is it?", "a photo of a"]
    outputs = captioner(images, text=prompts, **STOCK_GREEDY)
    assert [output["input_text"] for output in outputs] == prompts
    for output, image, prompt in zip(outputs, images, prompts, strict=True):
        assert output["generated_text"] == caption(model, processor, image, prompt)
        assert output["generated_text"].startswith(prompt)
    new = captioner(images, text=prompts, return_full_text=False, **STOCK_GREEDY)
    for output, full, prompt in zip(new, outputs, prompts, strict=True):
        assert output["generated_text"] == full["generated_text"].removeprefix(prompt)


def test_prompts_of_unequal_length_from_a_data_set_in_batches(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=folder)
    prompts = ["a", "a photo of a red square", "what is it?"]
    rows = [{"images": image, "text": text} for image, text in zip([*images, images[0]], prompts, strict=True)]
    expected = [caption(model, processor, row["images"], row["text"]) for row in rows]
    for inputs in (Rows(rows), (row for row in rows)):
        outputs = list(captioner(inputs, batch_size=2, **STOCK_GREEDY))
        assert [output[0]["generated_text"] for output in outputs] == expected


def test_several_captions_of_an_image(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=folder)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    outputs = captioner(images[0], text="a", generate_kwargs={**GREEDY, **beams})
    inputs = processor(images=[images[0]], text=["a"], return_tensors="pt")
    ids = model.generate(**inputs, **GREEDY, **beams)
    expected = processor.batch_decode(ids, skip_special_tokens=True)
    assert [output["generated_text"] for output in outputs] == expected
    assert not torch.equal(*ids)


def test_chat(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=folder)

    def chat(image, text):
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]

    (output,) = captioner(text=chat(images[0], "what is it?"), return_full_text=False, **STOCK_GREEDY)
    expected = caption(model, processor, images[0], "what is it?").removeprefix("what is it?")
    assert output["generated_text"].strip() == expected.strip()

    (output,) = captioner(text=chat(images[0], "what is it?"), **STOCK_GREEDY)
    assert output["generated_text"][-1] == {"role": "assistant", "content": expected}

    chats = [chat(images[0], "what is it?"), chat(images[1], "a")]
    outputs = captioner(text=chats, return_full_text=False, batch_size=2, **STOCK_GREEDY)
    texts = [caption(model, processor, images[1], "a").removeprefix("a").strip()]
    assert [output[0]["generated_text"].strip() for output in outputs] == [expected.strip(), *texts]

    begun = [*chat(images[0], "what is it?"), {"role": "assistant", "content": [{"type": "text", "text": "a red"}]}]
    (output,) = captioner(text=begun, return_full_text=False, **STOCK_GREEDY)
    full = caption(model, processor, images[0], "what is it? a red")
    assert output["generated_text"].strip() == full.removeprefix("what is it? a red").strip()


# ---------------------------------------------------------------------------------------- other tasks of transformers


def test_zero_shot_classification(folder, processor, images):
    labels = ["red", "a green square", "blue"]
    classifier = pipeline("zero-shot-image-classification", model=folder)
    texts = processor(text=[f"a photo of {label}" for label in labels], return_tensors="pt")
    pixels = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = CocaModel.from_pretrained(folder).eval()(**texts, **pixels).logits_per_image.softmax(-1)
    one = classifier(images[0], labels, hypothesis_template="a photo of {}")
    several = classifier(images, labels, hypothesis_template="a photo of {}", batch_size=2)
    for results, row in zip([*several, one], [*expected, expected[0]], strict=True):
        scores = {result["label"]: result["score"] for result in results}
        assert [scores[label] for label in labels] == pytest.approx(row.tolist(), abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_features(folder, processor, images):
    dual = CocaModel.from_pretrained(folder).eval()
    pixels = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        image = dual.get_image_features(**pixels)
        texts = [dual.get_text_features(**processor(text=[text], return_tensors="pt")) for text in TEXTS[:3]]
    extract = pipeline("image-feature-extraction", model=folder)
    np.testing.assert_allclose(extract(images[0])[0], image.last_hidden_state[0], atol=1e-5)
    for pool, expected in ((False, image.last_hidden_state), (True, image.pooler_output)):
        features = [row[0] for row in extract(images, batch_size=2, pool=pool)]
        np.testing.assert_allclose(features, expected, atol=1e-5)
    extract = pipeline("feature-extraction", model=folder)
    np.testing.assert_allclose(extract(TEXTS[0]), texts[0].last_hidden_state, atol=1e-5)
    for features, expected in zip(extract(TEXTS[:3], batch_size=3), texts, strict=True):  # padded on the right
        length = expected.last_hidden_state.shape[1]
        np.testing.assert_allclose(np.array(features)[0, :length], expected.last_hidden_state[0], atol=1e-5)


def test_image_classification(config, processor, tmp_path, images):
    folder = saved(
        CocaForImageClassification,
        config(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}),
        processor.image_processor,
        tmp_path,
    )
    classifier = pipeline("image-classification", model=folder)
    with torch.no_grad():
        logits = classifier.model(**processor(images=images, return_tensors="pt")).logits
    for results, row in zip(classifier(images, batch_size=2), logits.softmax(-1), strict=True):
        scores = {result["label"]: result["score"] for result in results}
        assert [scores["cat"], scores["dog"]] == pytest.approx(row.tolist(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------- image-captioning


def test_image_captioning(folder, model, processor, images):
    captioner = pipeline("image-captioning", model=folder)
    assert type(captioner) is CocaImageCaptioningPipeline
    expected = [caption(model, processor, image).strip() for image in images]
    assert captioner(images[0], **GREEDY) == [{"generated_text": expected[0]}]
    for inputs in (images, Rows(images), (image for image in images)):
        outputs = list(captioner(inputs, batch_size=2, **GREEDY))
        assert [output[0]["generated_text"] for output in outputs] == expected


def test_image_captioning_with_a_prompt_and_several_captions(folder, model, processor, images):
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    captioner = pipeline("image-captioning", model=folder, prompt="a photo of", **beams)
    inputs = processor(images=images, text=["a photo of"] * 2, return_tensors="pt")
    texts = processor.batch_decode(model.generate(**inputs, **beams), skip_special_tokens=True)
    outputs = captioner(images, batch_size=2)
    assert [[row["generated_text"] for row in output] for output in outputs] == [
        [text.strip() for text in texts[:2]],
        [text.strip() for text in texts[2:]],
    ]
    assert captioner(images[0], generate_kwargs={"num_return_sequences": 1}) == outputs[0][:1]
    assert captioner(images[0], prompt="")[0]["generated_text"] != outputs[0][0]["generated_text"]


def test_image_captioning_reads_files(folder, images, tmp_path):
    images[0].save(tmp_path / "image.png")
    captioner = pipeline("image-captioning", model=folder, **GREEDY)
    assert captioner(str(tmp_path / "image.png")) == captioner(images[0])


def test_own_pipelines_need_a_model_that_can_do_the_task(folder, answers_folder, processor):
    for task in ("image-captioning", "coca-vqa"):
        with pytest.raises(ValueError, match=r"needs a CocaForConditionalGeneration.*got a CocaModel"):
            pipeline(task, model=CocaModel.from_pretrained(folder), processor=processor)
    with pytest.raises(ValueError, match="got a CocaForVisualQuestionAnswering"):
        pipeline(
            "image-captioning",
            model=CocaForVisualQuestionAnswering.from_pretrained(answers_folder),
            processor=processor,
        )


# ------------------------------------------------------------------------------------------------------------ coca-vqa


def log_prob(model, processor, image, question, answer_ids):
    """Of an answer after a question, by one forward pass."""
    inputs = processor(images=[image], text=[question], return_tensors="pt")
    prompt = inputs["input_ids"][:, :-1]
    ids = torch.cat([prompt, answer_ids[None]], dim=1)
    with torch.no_grad():
        logits = model(ids, inputs["pixel_values"]).logits[0, prompt.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer_ids[:, None]).sum().item()


def test_questions_answered_in_words(folder, model, processor, images):
    vqa = pipeline("coca-vqa", model=folder)
    assert type(vqa) is CocaVisualQuestionAnsweringPipeline
    assert type(vqa.model) is CocaForConditionalGeneration
    questions = ["what is it?", "a photo of a"]
    expected = []
    for image, question in zip(images, questions, strict=True):
        inputs = processor(images=[image], text=[question], return_tensors="pt")
        answer = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] - 1 :]
        text = processor.decode(answer, skip_special_tokens=True).strip()
        score = np.exp(log_prob(model, processor, image, question, answer))
        expected.append([{"answer": text, "score": pytest.approx(score, rel=1e-4)}])
    pairs = [{"image": image, "question": question} for image, question in zip(images, questions, strict=True)]
    assert vqa(images[0], questions[0], **GREEDY) == expected[0]
    assert vqa(image=images, question=questions, **GREEDY) == expected
    assert vqa(pairs[0], **GREEDY) == expected[0]
    for inputs in (pairs, Rows(pairs), (pair for pair in pairs)):
        assert list(vqa(inputs, batch_size=2, **GREEDY)) == expected


def test_several_answers_in_words(folder, model, processor, images):
    vqa = pipeline("coca-vqa", model=folder, max_new_tokens=5)
    both = vqa(images[0], ["what is it?", "a"], top_k=3, batch_size=2)
    for question, answers in zip(["what is it?", "a"], both, strict=True):
        inputs = processor(images=[images[0]], text=[question], return_tensors="pt")
        rows = model.generate(**inputs, num_beams=3, num_return_sequences=3, max_new_tokens=5)
        expected = {}
        for row in rows[:, inputs["input_ids"].shape[1] - 1 :]:
            ends = (row == model.generation_config.eos_token_id).nonzero()
            row = row[: ends[0, 0] + 1] if len(ends) else row
            text = processor.decode(row, skip_special_tokens=True).strip()
            expected[text] = np.exp(log_prob(model, processor, images[0], question, row))
        assert {row["answer"]: row["score"] for row in answers} == pytest.approx(expected, rel=1e-4)
        assert len(answers) == 3
        assert [row["score"] for row in answers] == sorted((row["score"] for row in answers), reverse=True)


def test_the_score_of_an_answer_ends_with_its_end(folder, model, processor, images):
    """In a batch an answer that has ended is padded, and padding has no score."""
    vqa = pipeline("coca-vqa", model=folder, **GREEDY)
    questions = ["what is it?", "a", "a photo of a", "a red square"]
    inputs = processor(images=[images[0]], text=[questions[1]], return_tensors="pt")
    answer = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] - 1 :]
    second = answer[1].item()
    vqa.model.generation_config.eos_token_id = [model.generation_config.eos_token_id, second]
    answer = answer[: answer.tolist().index(second) + 1]
    expected = np.exp(log_prob(model, processor, images[0], questions[1], answer))
    single, batch = vqa(images[0], questions), vqa(images[0], questions, batch_size=4)
    assert batch[1][0]["score"] == pytest.approx(expected, rel=1e-4)
    assert [row[0]["score"] for row in batch] == pytest.approx([row[0]["score"] for row in single], rel=1e-4)


def test_questions_answered_from_a_list(answers_folder, processor, images):
    vqa = pipeline("coca-vqa", model=answers_folder)
    assert type(vqa.model) is CocaForVisualQuestionAnswering
    questions = ["what is it?", "a photo of a"]
    with torch.no_grad():
        logits = [
            vqa.model(**processor(images=[image], text=[question], return_tensors="pt")).logits[0]
            for image, question in zip(images, questions, strict=True)
        ]

    def expected(scores, top_k):
        scores, order = scores.sort(descending=True)
        return [
            {"answer": ANSWERS[i], "score": pytest.approx(score, abs=1e-6)}
            for i, score in list(zip(order.tolist(), scores.tolist(), strict=True))[:top_k]
        ]

    assert vqa(images[0], questions[0]) == expected(logits[0].softmax(-1), 5)
    outputs = vqa(images, questions, batch_size=2, top_k=99)
    assert outputs == [expected(row.softmax(-1), 6) for row in logits]
    assert vqa(images[0], questions[0], top_k=2, function_to_apply="sigmoid") == expected(logits[0].sigmoid(), 2)
    assert vqa(images[0], questions[0], top_k=1, function_to_apply="none") == expected(logits[0], 1)
    vqa.model.config.problem_type = "multi_label_classification"
    assert vqa(images[0], questions[0], top_k=2) == expected(logits[0].sigmoid(), 2)


@pytest.fixture(scope="module", params=[CocaForConditionalGeneration, CocaForVisualQuestionAnswering])
def adapter(request, folder, answers_folder, processor, tmp_path_factory):
    peft = pytest.importorskip("peft")
    base = folder if request.param is CocaForConditionalGeneration else answers_folder
    model = peft.get_peft_model(request.param.from_pretrained(base), peft.LoraConfig(target_modules=["fc1"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return base, str(path), model.merge_and_unload()


def test_questions_to_an_adapter(adapter, images, recwarn):
    base, folder, merged = adapter
    vqa = pipeline("coca-vqa", model=folder)
    assert type(vqa.model) is type(merged)
    answers = vqa(images[0], "what is it?")
    assert answers != pipeline("coca-vqa", model=base)(images[0], "what is it?")
    vqa.model = merged
    assert answers[0] == pytest.approx(vqa(images[0], "what is it?")[0])
    recwarn.clear()  # PEFT calls transformers by names of yesterday


def test_one_question_for_all_images(answers_folder, images):
    vqa = pipeline("coca-vqa", model=answers_folder, top_k=2)
    assert vqa(images, "what is it?") == [vqa(image, "what is it?") for image in images]


def test_vqa_says_what_is_wrong(folder, answers_folder, images):
    vqa = pipeline("coca-vqa", model=folder)
    with pytest.raises(ValueError, match="2 images for 3 questions"):
        vqa(images, ["a", "b", "c"])
    with pytest.raises(ValueError, match='"question"'):
        vqa(images[0])
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        vqa(images[0], "what is it?", top_k=0)
    vqa = pipeline("coca-vqa", model=answers_folder)
    with pytest.raises(ValueError, match="does not generate: leave out max_new_tokens"):
        vqa(images[0], "what is it?", max_new_tokens=3)
    with pytest.raises(ValueError, match="`function_to_apply` must be"):
        vqa(images[0], "what is it?", function_to_apply="tanh")
