import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

import modeling_coca  # noqa: F401  (registers the Auto classes)
from modeling_coca.image_processing_pil_coca import CocaImageProcessorPil
from modeling_coca.processing_coca import CocaProcessor
from modeling_coca.tokenization_coca import CocaTokenizer

pytest.importorskip("torchvision")
from modeling_coca.image_processing_coca import CocaImageProcessor

CORPUS = ["a photo of a red fox", "what is this?", "two blue whales"] * 8
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor():
    return CocaProcessor(CocaImageProcessor(size=32), CocaTokenizer().train_new_from_iterator(CORPUS, vocab_size=450))


def user(*parts):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def test_images_and_texts(processor):
    texts = ["a photo of a red fox", "two"]
    inputs = processor(images=[IMAGE, IMAGE], text=texts, return_tensors="pt")
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "pixel_values": (2, 3, 32, 32),
    }
    # Padded on the left: every row ends in <end_of_text>, which generate() can take off as one column.
    tokenizer = processor.tokenizer
    assert inputs["input_ids"][:, -1].tolist() == [tokenizer.eos_token_id] * 2
    assert inputs["attention_mask"][1].tolist() == [0] * 5 + [1] * 3
    assert inputs["input_ids"][1, :6].tolist() == [tokenizer.pad_token_id] * 5 + [tokenizer.bos_token_id]
    assert torch.equal(
        inputs["pixel_values"], processor.image_processor([IMAGE, IMAGE], return_tensors="pt")["pixel_values"]
    )
    right = processor(text=texts, padding_side="right", return_tensors="pt")
    assert torch.equal(right["input_ids"], tokenizer(texts, padding=True, return_tensors="pt")["input_ids"])
    assert tokenizer.padding_side == "right"


def test_one_modality_alone(processor):
    assert list(processor(images=IMAGE, return_tensors="pt")) == ["pixel_values"]
    text = processor(text="two blue whales")
    assert text["input_ids"] == processor.tokenizer("two blue whales")["input_ids"] and "pixel_values" not in text
    assert isinstance(processor(text=["a", "two"])["input_ids"], list)  # tensors only where they are asked for
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_settings_reach_their_part(processor):
    images = [[IMAGE], [IMAGE]]
    inputs = processor(images=images, text=["a", "two"], size=24, padding="max_length", return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 24, 24) and inputs["input_ids"].shape == (2, 76)
    inputs = processor(images=IMAGE, return_tensors="pt", images_kwargs={"resize_mode": "squash", "size": 20})
    assert inputs["pixel_values"].shape == (1, 3, 20, 20)
    assert set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values"}


def test_too_long_and_misplaced_texts(processor):
    with pytest.raises(ValueError, match=r"102 tokens.*limit is 76.*truncation=True"):
        processor(images=IMAGE, text="fox " * 100, return_tensors="pt")
    cut = processor(text=["fox " * 100, "a"], truncation=True, return_tensors="pt")["input_ids"]
    assert cut.shape == (2, 76) and cut[:, -1].tolist() == [processor.tokenizer.eos_token_id] * 2
    with pytest.raises(ValueError, match=r"'a red fox' cannot be loaded.*`text=`"):
        processor("a red fox", IMAGE)


def test_decoding(processor):
    ids = processor(text=["a red fox!", "two"], return_tensors="pt")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["a red fox!", "two"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a red fox!", "two"]
    generated = torch.cat([ids[:, :-1], torch.tensor([[2, 0], [5, 2]])], dim=1)  # a row that ended before the other
    assert processor.post_process_image_text_to_text(generated)[0] == "a red fox!"


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([user(IMAGE, "What is  this?")], "What is  this?"),
        ([user(IMAGE)], ""),
        ([{"role": "system", "content": "Be nice."}, user("what", IMAGE, "is this?")], "what is this?"),
        ([user(IMAGE), {"role": "assistant", "content": [{"type": "text", "text": "a photo of"}]}], "a photo of"),
        ([user(IMAGE, "describe:"), {"role": "assistant", "content": "a red"}], "describe: a red"),
    ],
)
def test_chat_template(processor, messages, prompt):
    goes_on = messages[-1]["role"] == "assistant"
    how = {"continue_final_message": goes_on, "add_generation_prompt": not goes_on}
    assert processor.apply_chat_template(messages, **how) == prompt
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **how)
    assert inputs["input_ids"].tolist() == [processor.tokenizer(prompt)["input_ids"]]
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_chat_template_in_a_batch(processor):
    chats = [[user(IMAGE, "what is this?")], [user(IMAGE, "what")]]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["input_ids"][:, -1].tolist() == [processor.tokenizer.eos_token_id] * 2
    assert inputs["attention_mask"].sum(1).tolist() == [6, 3]


@pytest.mark.parametrize(("backend", "kind"), [("torchvision", CocaImageProcessor), ("pil", CocaImageProcessorPil)])
def test_saved_processor_loads(processor, tmp_path, backend, kind):
    processor.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "CocaProcessor"
    want = processor(images=[IMAGE, IMAGE], text=["a red fox!", "two"], return_tensors="pt")
    for loaded in (
        CocaProcessor.from_pretrained(tmp_path, backend=backend),
        AutoProcessor.from_pretrained(tmp_path, backend=backend),
    ):
        assert type(loaded) is CocaProcessor and type(loaded.tokenizer) is CocaTokenizer
        assert type(loaded.image_processor) is kind
        assert loaded.chat_template == processor.chat_template
        got = loaded(images=[IMAGE, IMAGE], text=["a red fox!", "two"], return_tensors="pt")
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is CocaTokenizer
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend=backend)) is kind


# ------------------------------------------------------------------------------------------------------------ videos


def test_frames_of_a_video(processor):
    frames = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 50, 3), dtype=np.uint8)
    expected = torch.stack([processor(images=list(clip), return_tensors="pt")["pixel_values"] for clip in frames])
    inputs = processor(videos=list(frames), text=["two", "a photo"], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected) and inputs["input_ids"].shape[0] == 2
    pictures = [[Image.fromarray(frame) for frame in clip] for clip in frames]
    assert torch.equal(processor(videos=pictures, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor(videos=frames[1], return_tensors="pt")["pixel_values"], expected[1:])  # one of them
    untensored = processor(videos=list(frames))["pixel_values"]
    assert [len(clip) for clip in untensored] == [3, 3]
    assert torch.equal(torch.as_tensor(np.asarray(untensored[1][2])), expected[1, 2])


def test_video_errors(processor):
    frames = np.zeros((3, 40, 50, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"`videos` must have equally many frames, got \[3, 2\]"):
        processor(videos=[frames, frames[:2]])
    with pytest.raises(ValueError, match="Give `images` or `videos`"):
        processor(images=IMAGE, videos=[frames])


def test_a_video_file(processor, tmp_path):
    av = pytest.importorskip("av")
    path = str(tmp_path / "clip.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(20):  # from dark to bright
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 + 12 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixel_values = processor(videos=path, num_frames=5, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 5, 3, 32, 32)
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    brightness = ((pixel_values[0] * std + mean) * 255).mean((1, 2, 3))
    torch.testing.assert_close(brightness, 10 + 12 * torch.tensor([0.0, 4, 8, 12, 16]), atol=4, rtol=0)
    assert processor(videos=[path, path], return_tensors="pt")["pixel_values"].shape == (2, 8, 3, 32, 32)
    with pytest.raises(ValueError, match="exceeds total_num_frames=20"):
        processor(videos=path, num_frames=21)
