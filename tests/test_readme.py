"""The code of the README and of docs/ runs, page by page, on a model saved where the quickstart saves its own."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from modeling_coca import CocaForConditionalGeneration, CocaImageProcessorPil, CocaProcessor, CocaTokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def open_clip_names():
    """What an open_clip folder holds: the model's JSON and its weights."""
    with safe_open(ROOT / "tests" / "fixtures" / "open_clip_default.safetensors", "pt") as file:
        weights = {name[3:]: file.get_tensor(name) for name in file.keys() if name.startswith("sd.")}
        return {"model_cfg": json.loads(file.metadata()["config"]), "state_dict": weights}


def blocks_of(page: str) -> list[str]:
    """Python that can run here: what needs a library of its own is marked `py`, and tested in tests/tools."""
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def readme_names(tiny_config, open_clip_names, tmp_path_factory):
    """What the README's code leaves, run in a folder with the quickstart's model."""
    texts = ["what kind of thing is this?", "a red apple", "the flag of japan", "a white square"]
    tokenizer = CocaTokenizer(model_max_length=30).train_new_from_iterator(texts, vocab_size=450)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_config(text_config={"vocab_size": len(tokenizer), "max_position_embeddings": 31, **ids})
    folder = tmp_path_factory.mktemp("readme") / "outputs" / "quickstart"
    CocaForConditionalGeneration(config).save_pretrained(folder)
    CocaProcessor(CocaImageProcessorPil(size=config.vision_config.image_size), tokenizer).save_pretrained(folder)
    names, printed = dict(open_clip_names), io.StringIO()
    with contextlib.chdir(folder.parents[1]), contextlib.redirect_stdout(printed):
        for block in blocks_of(README):
            exec(compile(block, "README.md", "exec"), names)
        yield {**names, "printed": printed.getvalue()}


def test_the_readmes_code_runs(readme_names):
    trainer, model = readme_names["trainer"], readme_names["model"]
    trainer.args.max_steps = 1
    assert trainer.train().global_step == 1
    assert not any(p.requires_grad for p in trainer.model.model.vision_model.parameters())
    assert len(blocks_of(README)) >= 6 and f"torch.Size([1, {model.config.projection_dim}])" in readme_names["printed"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_docs_code_runs(page, readme_names):
    names = dict(readme_names)  # a page goes on from the README
    for block in blocks_of(page.read_text(encoding="utf-8")):
        for library in ("peft", "sentence_transformers"):
            if f"from {library} " in block:
                pytest.importorskip(library)
        exec(compile(block, page.name, "exec"), names)


def test_named_files_exist():
    for name in re.findall(r"^\| `([\w/]+(?:/|\.py))`", README, re.MULTILINE):
        assert (ROOT / name).exists(), name
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
