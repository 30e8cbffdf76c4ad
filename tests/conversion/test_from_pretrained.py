"""`from_pretrained` on checkpoints of other libraries: they open, and nothing of it shows when they are saved."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import modeling_coca
from modeling_coca import (
    CocaConfig,
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaModel,
    CocaProcessor,
    CocaTokenizer,
)
from modeling_coca.conversion import convert, from_open_clip, to_open_clip


@pytest.fixture(params=["open_clip_config.json", "config.json"])
def source(request, checkpoint):
    """A JSON of either name may be open_clip's: LAION's, and Apple's."""
    return checkpoint(config_file=request.param)


def test_it_is_the_model_that_the_conversion_makes(source, sample):
    given = sample("open_clip_default")
    expected = from_open_clip(given.config, given.state_dict)
    model, loading = CocaForConditionalGeneration.from_pretrained(source, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not model.training
    assert model.name_or_path == str(source)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert model.config.to_diff_dict().keys() >= {"text_config", "vision_config"}
    images = given.tensors["in.images"]
    assert torch.equal(model.generate(images, max_length=9), expected.generate(images, max_length=9))


def test_arguments_of_from_pretrained_hold(source):
    model = CocaForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16, attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert CocaModel.from_pretrained(str(source)).dtype == torch.float32
    path = source / "open_clip_pytorch_model.bin"
    assert CocaForConditionalGeneration.from_pretrained(path).name_or_path == str(path)


def test_other_classes_take_their_part(source, sample):
    given = sample("open_clip_default")
    dual = CocaModel.from_pretrained(source)
    features = dual.get_image_features(given.tensors["in.images"]).pooler_output
    assert (features - given.tensors["out.image_features_raw"]).abs().max() <= 1e-5
    classifier = CocaForImageClassification.from_pretrained(source, num_labels=3)
    assert classifier.classifier.out_features == 3
    positions = given.state_dict["visual.positional_embedding"]
    assert torch.equal(classifier.vision_model.embeddings.position_embedding.weight, positions)


def test_saving_writes_our_layout(source, sample, tmp_path):
    CocaForConditionalGeneration.from_pretrained(source).save_pretrained(tmp_path / "saved")
    convert(source, tmp_path / "converted")
    saved, converted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "converted"))
    assert set(saved) == set(converted)
    assert all(torch.equal(saved[name], converted[name]) for name in saved)
    # and so does a model made afterwards
    model = CocaForConditionalGeneration(CocaConfig.from_pretrained(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "new")
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == set(saved)
    reloaded = CocaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert set(to_open_clip(reloaded)[1]) == set(sample("open_clip_default").state_dict)


def test_half_precision_stays(checkpoint):
    source = checkpoint(dtype=torch.float16)
    assert CocaForConditionalGeneration.from_pretrained(source).dtype == torch.float16


def test_the_processor_opens_too(tmp_path):
    pytest.importorskip("open_clip")
    config = CocaConfig(
        vision_config={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1},
        text_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_multimodal_layers": 1,
            "num_attention_heads": 1,
            "shifted_cls_mask": True,
        },
        projection_dim=64,
        pooler_type="shared",
    )
    torch.save(to_open_clip(CocaForConditionalGeneration(config))[1], tmp_path / "open_clip_pytorch_model.bin")
    processor = CocaProcessor.from_pretrained(tmp_path)
    inputs = processor(images=[Image.new("RGB", (50, 60))], text=["a cat"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 288, 288)
    assert processor.tokenizer.get_vocab() == CocaTokenizer.from_open_clip_bpe().get_vocab()
    assert CocaModel.from_pretrained(tmp_path)(**inputs).logits_per_image.shape == (1, 1)


def test_a_processor_without_vocabulary_is_an_error(source):
    with pytest.raises(ValueError, match="no tokenizer beside the weights"):
        CocaProcessor.from_pretrained(source)


def test_warnings_are_logged(checkpoint, caplog):
    source = checkpoint(folder="mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k")
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        with caplog.at_level("WARNING"):
            model = CocaForConditionalGeneration.from_pretrained(source)
    finally:
        logger.propagate = before
    assert "trained on captions alone" in caplog.text
    assert model.generation_config.num_beams == 6


def test_errors_are_those_of_transformers_where_there_is_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        CocaForConditionalGeneration.from_pretrained(tmp_path / "empty")
    with pytest.raises(OSError, match="find them in the cached files"):
        CocaForConditionalGeneration.from_pretrained("nobody/nothing", local_files_only=True)
    model = CocaModel(
        CocaConfig(
            vision_config={"num_hidden_layers": 1}, text_config={"num_hidden_layers": 1, "num_multimodal_layers": 1}
        )
    )
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        CocaModel.from_pretrained(tmp_path / "ours")


def test_no_random_model_where_there_is_no_config(sample, tmp_path):
    """transformers takes a missing config.json for the default one, and these files' names for its own."""
    torch.save(sample("open_clip_default").state_dict, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="heads of the image tower"):
        CocaForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no config\.json with a `model_type`.*coca convert"):
        CocaConfig.from_pretrained(tmp_path)


def test_what_does_not_fit_is_told(checkpoint):
    def lose(state_dict):
        return {name: tensor for name, tensor in state_dict.items() if name != "visual.proj"}

    with pytest.raises(ValueError, match=r"1 missing:\n  visual\.proj"):
        CocaForConditionalGeneration.from_pretrained(checkpoint(change=lose))


def test_auto_classes_need_a_converted_folder(source):
    with pytest.raises((OSError, ValueError), match=r"model_type|config\.json"):
        AutoModel.from_pretrained(source)


@pytest.mark.parametrize("file", ["modeling_coca.py", "processing_coca.py", "configuration_coca.py"])
def test_code_on_the_hub_does_not_ask_for_this_package(file):
    path = Path(modeling_coca.__file__).parent / file
    assert "modeling_coca" not in get_imports(path)
    assert all("conversion" not in name for name in get_relative_imports(path))
