"""`coca export`: folders that open without this package, with transformers or ONNX Runtime."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_coca import CocaForConditionalGeneration, CocaForImageClassification, CocaModel, CocaProcessor


def test_a_folder_brings_its_code(coca, model_folder, tmp_path):
    out = tmp_path / "exported"
    code, text, _ = coca("export", out)
    opener = f'transformers.AutoModelForImageTextToText.from_pretrained("{out}", trust_remote_code=True)'
    assert (code, text) == (0, f"{out}: open it with {opener}\n")
    assert {"README.md", "modeling_coca.py", "processing_coca.py", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_coca.CocaModel"
    before, after = (CocaForConditionalGeneration.from_pretrained(f).state_dict() for f in (model_folder, out))
    assert all(torch.equal(before[name], after[name]) for name in before)

    code, _, err = coca("export", out)
    assert code == 1 and "name another folder, or pass `--overwrite`" in err
    (out / "own.txt").write_text("mine")
    code, text, _ = coca("export", out, "--overwrite", "--json")
    done = json.loads(text)
    assert done["output"] == str(out) and done["class"] == "CocaForConditionalGeneration" and "own.txt" in done["files"]


@pytest.mark.parametrize("model_class", [CocaForImageClassification, CocaModel])
def test_a_model_is_exported_as_what_it_was_saved_as(model_class, coca, model_folder, tmp_path):
    """Here without a processor."""
    model_class.from_pretrained(model_folder).save_pretrained(tmp_path / "saved")
    code, text, err = coca("export", tmp_path / "out", "--model", tmp_path / "saved", "--json")
    assert code == 0 and json.loads(text)["class"] == model_class.__name__ and "has no processor" in err
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [model_class.__name__]
    code, _, err = coca("export", tmp_path / "graphs", "--model", tmp_path / "saved", "--onnx")
    assert code == 1 and ("graphs are made of" in err or "says how large its images are" in err)
    assert not (tmp_path / "graphs").exists()


def test_graphs_run_without_pytorch(coca, model_folder, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, processor = CocaModel.from_pretrained(model_folder).eval(), CocaProcessor.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    code, text, _ = coca("export", tmp_path / "graphs", "--model", tmp_path / "saved", "--onnx", "--json")
    expected = {"image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "processor_config.json"}
    assert code == 0 and expected <= set(json.loads(text)["files"])
    image = Image.effect_noise((40, 50), 90).convert("RGB")
    pixels = processor(images=[image] * 3, return_tensors="pt")["pixel_values"]
    session = onnxruntime.InferenceSession(tmp_path / "graphs/image_encoder.onnx", providers=["CPUExecutionProvider"])
    embeds = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})[0]
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
    np.testing.assert_allclose(embeds, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export"], 2, "Missing argument 'OUT'"),
        (["export", "{tmp}/out", "--model", "./nowhere"], 1, "nowhere"),
        (["export", "{tmp}/taken"], 1, "name another folder: it holds no model"),
    ],
)
def test_errors_take_one_line(arguments, code, message, coca, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("")
    result = coca(*[argument.format(tmp=tmp_path) for argument in arguments])
    assert result[0] == code and message in result[2] and not (tmp_path / "out").exists()
    assert code == 2 or len(result[2].strip().splitlines()) == 1
