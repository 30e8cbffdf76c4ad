"""Files with bytes that were changed, lost or put in: each reader gives the right answer or an error that it documents.

Whatever a reader does not catch itself fails the test; what ends the process or hangs ends the run.
"""
# ruff: noqa: PT017  (an error is as good as an answer, so it cannot be expected)

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from modeling_coca import CocaConfig, CocaForConditionalGeneration
from modeling_coca.conversion import from_open_clip, open_checkpoint
from modeling_coca.conversion.open_clip import to_open_clip
from modeling_coca.conversion.sources import Weights, check_files, open_weights
from modeling_coca.inference import open_images
from modeling_coca.inference.journal import Journal
from modeling_coca.training import SkippedImages

fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damage(draw):
    """A function that spoils bytes: some changed, a part cut out or doubled, noise put in, or the end lost."""
    kind = draw(st.sampled_from(["flip", "cut", "end", "insert", "double", "replace"]))
    place = draw(st.floats(0, 1))
    noise = draw(st.binary(min_size=1, max_size=24))
    near = draw(st.booleans())  # headers stand at the beginning

    def spoil(content: bytes) -> bytes:
        at = int(place * min(len(content), 400 if near else len(content)))
        behind = at + len(noise)
        return {
            "flip": content[:at]
            + bytes(a ^ b for a, b in zip(content[at:behind], noise, strict=False))
            + content[behind:],
            "replace": content[:at] + noise + content[behind:],
            "insert": content[:at] + noise + content[at:],
            "double": content[:behind] + content[at:],
            "cut": content[:at] + content[behind:],
            "end": content[:at],
        }[kind]

    return spoil


@pytest.fixture(scope="module")
def open_clip():
    """`model_cfg` and weights of a tiny CoCa."""
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "num_hidden_layers": 2, "num_multimodal_layers": 1, "vocab_size": 50, "max_position_embeddings": 9}
    config = CocaConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        text_config={**text, "bos_token_id": 48, "eos_token_id": 49, "shifted_cls_mask": True},
        projection_dim=32,
        pooler_type="shared",
        num_query_tokens=2,
    )
    return to_open_clip(CocaForConditionalGeneration(config))


# ------------------------------------------------------------------------------------------------------------ weights


@fuzz
@given(spoil=damage())
def test_safetensors(spoil, tmp_path):
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(spoil(save(tensors, metadata={"format": "pt"})))
    try:
        weights = Weights([path])
        read = {name: weights[name] for name in weights}
    except ValueError as error:
        assert "model.safetensors" in str(error)
        return
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == dict(weights.shapes)


@fuzz
@given(spoil=damage(), legacy=st.booleans())
def test_pickles(spoil, legacy, tmp_path):
    content = io.BytesIO()
    torch.save(
        {"state_dict": {"a.weight": torch.arange(6.0)}, "epoch": 3}, content, _use_new_zipfile_serialization=not legacy
    )
    path = tmp_path / "model.bin"
    path.write_bytes(spoil(content.getvalue()))
    try:
        tensors = open_weights(path)
    except ValueError as error:
        assert "model.bin" in str(error)
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@fuzz
@given(spoil=damage())
def test_indices(spoil, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(spoil(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}).encode()))
    try:
        check_files(tmp_path)
    except (ValueError, FileNotFoundError) as error:
        assert str(index) in str(error)


# ------------------------------------------------------------------------------------------------------------ configs

scalars = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=4)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=2), max_leaves=4
)


@fuzz
@given(data=st.data())
def test_values_of_open_clip_configs(data, open_clip):
    """Any value for any key, or none: the model, or an error with the key or the tensor."""
    model_cfg, state_dict = json.loads(json.dumps(open_clip[0])), open_clip[1]
    section = data.draw(st.sampled_from(["", "vision_cfg", "text_cfg", "multimodal_cfg"]))
    place = model_cfg[section] if section else model_cfg
    key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        place[key] = data.draw(values)
    else:
        del place[key]
    try:
        model = from_open_clip(model_cfg, state_dict)
    except ValueError as error:
        assert str(error)
        return
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@fuzz
@given(spoil=damage())
def test_bytes_of_open_clip_configs(spoil, open_clip, tmp_path):
    path = tmp_path / "open_clip_config.json"
    weights = tmp_path / "open_clip_model.safetensors"
    if not weights.exists():
        save_file(open_clip[1], weights)
    path.write_bytes(spoil(json.dumps({"model_cfg": open_clip[0]}).encode()))
    try:
        found = open_checkpoint(tmp_path)
    except ValueError as error:
        assert str(error)
        return
    assert found.config.model_type == "coca"


# --------------------------------------------------------------------------------------------------------- tables, tars


def png():
    content = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(content, "PNG")
    return content.getvalue()


def tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in (("a.png", png()), ("a.txt", b"red"), ("b.png", png())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def parquet():
    content = io.BytesIO()
    pq.write_table(pa.table({"image": [png()] * 2, "text": ["a", "b"]}), content)
    return content.getvalue()


TABLES = {
    ".csv": b'image,text\n0.png,"a, b"\n1.png,c\n',
    ".tsv": b"image\ttext\n0.png\ta\n1.png\tb\n",
    ".jsonl": b'{"image": "0.png", "text": "a"}\n{"image": "1.png", "text": "b"}\n',
    ".parquet": parquet(),
    ".tar": tar(),
}


@pytest.mark.parametrize("suffix", TABLES)
@fuzz
@given(spoil=damage())
def test_sources_of_images(suffix, spoil, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"{hash(spoil(TABLES[suffix])) & (2**60 - 1):x}{suffix}"
    path.write_bytes(spoil(TABLES[suffix]))  # a new name each, as readers keep files open
    try:
        shards = open_images(str(path), keep=[] if suffix == ".tar" else ["text"])
        listed = [(shard, key) for shard in shards for _, key in shard.list()]
    except ValueError as error:
        assert str(error)
        return
    assert len(listed) <= 8
    for shard, key in listed:
        try:
            shard.read(key)
        except (ValueError, OSError) as error:  # one row that names its reason
            assert str(error)


# ------------------------------------------------------------------------------------------------------------ journals


@fuzz
@given(spoil=damage(), cut=st.floats(0, 1))
def test_journals(spoil, cut, tmp_path_factory):
    """What a journal still tells is taken, the rest is done again: in the end each image has its row, once."""
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder / "out.jsonl", {"model": "m"}, num_shards=1)
    journal.begin(0, size=4)
    journal.write(0, [(place, {"id": str(place), "caption": "ä red square"}) for place in range(3)])
    journal.release()
    path = journal.work / "shard-000000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(spoil(whole)[: max(1, int(cut * len(whole)))])
    journal = Journal(folder / "out.jsonl", {"model": "m"}, num_shards=1)
    done = journal.begin(0, size=4)
    assert done <= set(range(4))
    if missing := sorted(set(range(4)) - done):
        journal.write(0, [(place, {"id": str(place), "caption": "again"}) for place in missing])
    assert journal.close()["images"] == 4
    assert len((folder / "out.jsonl").read_text().splitlines()) == 4


@fuzz
@given(spoil=damage())
def test_lists_of_skipped_images(spoil, tmp_path_factory):
    path = tmp_path_factory.mktemp("skipped") / "skipped.jsonl"
    lines = [json.dumps({"split": "train", "image": f"{i}.png", "error": "é"}) for i in range(3)]
    path.write_bytes(spoil("\n".join(lines).encode() + b"\n"))
    skipped = SkippedImages(path, resume=True)
    skipped.add("train", "new.png", "broken")
    assert "new.png" in {entry["image"] for entry in skipped.entries()}
    assert os.path.getsize(path) > 0
