"""What files from strangers can do: what they cost, where they lead, and that none of them runs code."""

import ast
import contextlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import faiss
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, TrainingArguments, pipeline

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaModel, CocaProcessor
from modeling_coca.conversion import convert, convert_to_open_clip
from modeling_coca.conversion.sources import open_weights
from modeling_coca.evaluation import ZeroShotClassificationEvaluator
from modeling_coca.hub.model_card import cell, code_block, model_card
from modeling_coca.inference import draw_confusion, embed_images, limits, load_for_inference, open_images
from modeling_coca.inference.loading import open_image
from modeling_coca.retrieval import CocaIndex
from modeling_coca.training import CocaDataCollator, CocaTrainer, EmaCallback, FrozenFeatures, SkippedImages, load_data
from modeling_coca.training.recipe import ModelArguments, load_model


def save_picture(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def read_all(shards):
    """id -> the image's bytes or path, or why it was refused."""
    found = {}
    for shard in shards:
        for name, key in shard.list():
            try:
                found[name] = shard.read(key)[0]
            except ValueError as error:
                found[name] = error
    return found


@pytest.fixture
def places(tmp_path):
    """A folder `data` with a picture, one beside it that is none of its business, and a link that leads there."""
    save_picture(tmp_path / "data/own.png")
    secret = save_picture(tmp_path / "secret/private.png")
    (tmp_path / "data/link.png").symlink_to(secret)
    (tmp_path / "data/linked").symlink_to(tmp_path / "secret")
    return tmp_path


ESCAPES = [
    "../secret/private.png",
    "{root}/secret/private.png",
    "link.png",
    "linked/private.png",
    "a/../../secret/private.png",
]


# ------------------------------------------------------------------------------------------------ where paths lead


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_paths_in_data_open_nothing_outside_their_folder(kind, escape, places):
    escape, data = escape.format(root=places), places / "data"
    if kind == "csv":
        (data / "list.csv").write_text(f"path\nown.png\n{escape}\n")
        source = data / "list.csv"
    elif kind == "jsonl":
        (data / "list.jsonl").write_text(f'{{"path": "own.png"}}\n{{"path": "{escape}"}}\n')
        source = data / "list.jsonl"
    elif kind == "parquet":
        images = pa.array([{"bytes": None, "path": "own.png"}, {"bytes": None, "path": escape}])
        pq.write_table(pa.table({"image": images}), data / "set.parquet")
        source = data / "set.parquet"
    else:  # as `save_to_disk` never writes it: a path without the bytes
        features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
        rows = [{"bytes": None, "path": str(data / path)} for path in ("own.png", escape)]
        datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(data / "saved")
        source = data / "saved"
    own, other = read_all(open_images(source, image_root=data if kind == "saved" else None)).values()
    assert os.path.samefile(own, data / "own.png")
    assert isinstance(other, ValueError) and "leads out of" in str(other) and "`image_root`" in str(other)
    own, other = read_all(open_images(source, image_root=places)).values()  # the user says that it may
    if "a/.." not in escape:
        assert os.path.samefile(other, places / "secret/private.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("escape", [*ESCAPES, "file://{root}/secret/private.png", "http://127.0.0.1:9/private.png"])
def test_paths_in_training_data_open_nothing_outside_their_folder(streaming, escape, places):
    data = places / "data"
    (data / "all.csv").write_text(f"image,text\nown.png,mine\n{escape.format(root=places)},not mine\n")
    skipped = SkippedImages()
    options = {"data_files": {"train": str(data / "all.csv")}, "streaming": streaming, "skipped": skipped}
    assert [row["text"] for row in load_data(**options)["train"]] == ["mine"]
    (entry,) = skipped.entries()
    assert ("is a URL" if "://" in escape else "leads out of") in entry["error"]
    if "://" not in escape and "a/.." not in escape:
        assert len(list(load_data(**options, image_root=places)["train"])) == 2


def test_a_folder_cannot_name_files_elsewhere_in_its_own_description(places):
    """`datasets` follows `data_files` in a folder's README.md wherever they lead."""
    described = places / "described"
    described.mkdir()
    (described / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../secret/*.png\n---\n")
    with pytest.raises(ValueError, match=r"Not one image of 'train'.*leads out of"):
        load_data(described)


def test_a_table_that_leads_elsewhere_from_its_first_row_is_refused_at_once(places):
    (places / "data/list.csv").write_text("path\n/etc/hostname\n")
    with pytest.raises(ValueError, match=r"/etc/hostname leads out of .*data: say by `image_root`"):
        open_images(places / "data/list.csv")


def test_links_in_a_folder_lead_nowhere_else_and_not_in_circles(places):
    data = places / "data"
    save_picture(data / "sub/two.png")
    (data / "sub/up").symlink_to(data)
    (data / "sub/again.png").symlink_to(data / "own.png")
    names = {os.path.relpath(name, data) for name in read_all(open_images(data))}
    assert {"own.png", "sub/two.png", "sub/again.png"} <= names and not any(
        "private" in n or n == "link.png" for n in names
    )
    assert len(names) < 10
    everything = {os.path.realpath(name) for name in read_all(open_images(data, image_root=places))}
    assert str(places / "secret/private.png") in everything
    (places / "links").mkdir()
    (places / "links/a").symlink_to(places / "secret")
    with pytest.raises(ValueError, match=r"1 links lead out of .* by `image_root`"):
        open_images(places / "links")


def test_a_repository_in_the_cache_of_the_hub_is_links_into_its_own_folder(tmp_path):
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots/0123/train"
    blob = save_picture(repository / "blobs/x.png")
    snapshot.mkdir(parents=True)
    (snapshot / "1.png").symlink_to(blob)
    for folder in (snapshot.parent, snapshot):
        (image,) = read_all(open_images(folder)).values()
        assert os.path.samefile(image, blob)


def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # would be waited for
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ValueError, match="no plain file"):
            open_image(str(path))


# -------------------------------------------------------------------------------------------------- what files cost


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_refused_by_their_header(tmp_path, monkeypatch):
    large, jpeg = save_picture(tmp_path / "large.png", (10, 11)), save_picture(tmp_path / "large.jpg", (32, 6))
    (tmp_path / "all.csv").write_text("image,text\nlarge.png,x\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(ValueError, match="10 x 11 pixels are more than the 100"):
            open_image(str(large))
        with pytest.raises(ValueError, match="10 x 11 pixels are more than the 100"):
            load_data(tmp_path / "all.csv")
    assert open_image(str(jpeg), at_least=2).size < (32, 6)


def test_no_image_is_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("ran"))
    save_picture(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "harmless.png")
    (tmp_path / "all.csv").write_text("image,text\nharmless.png,x\n")
    with pytest.raises(ValueError, match="Ghostscript"):
        open_image(str(tmp_path / "harmless.png"))
    with pytest.raises(ValueError, match="Ghostscript"):
        load_data(tmp_path / "all.csv")


@pytest.mark.parametrize("column", ["image", "jpg"])
def test_a_parquet_file_of_some_hundred_bytes_does_not_become_gigabytes(column, tmp_path):
    """One value that a thousand rows share: 300 MB, were each to have a copy."""
    value = b"x" * 300_000
    values = pa.array([value] * 1000)
    if column == "image":
        values = pa.StructArray.from_arrays([values, pa.nulls(1000, pa.string())], ["bytes", "path"])
    pq.write_table(pa.table({column: values}), tmp_path / "bomb.parquet", compression="zstd")
    assert os.path.getsize(tmp_path / "bomb.parquet") < 5000
    before = pa.total_allocated_bytes()
    (shard,) = open_images(tmp_path / "bomb.parquet")
    assert shard.read(0)[0] == shard.read(999)[0] == value
    assert pa.total_allocated_bytes() - before < 10e6


def test_row_groups_and_tar_members_have_bounds(tmp_path, monkeypatch):
    for name, sizes in {"large": (6000, 10), "fine": (3000, 9000)}.items():
        columns = {column: [os.urandom(size)] for column, size in zip(("jpg", "other"), sizes, strict=True)}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", write_statistics=False)
    monkeypatch.setattr(limits, "MAX_ROW_GROUP_BYTES", 5_000)
    (refused,) = read_all(open_images(tmp_path / "large.parquet")).values()
    assert "more than the 5,000 that are read: write the file anew" in str(refused)
    (fine,) = read_all(open_images(tmp_path / "fine.parquet")).values()
    assert len(fine) == 3000

    monkeypatch.setattr(limits, "MAX_VALUE_BYTES", 500)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, size in (("a.png", 500), ("b.png", 501)):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, open("/dev/zero", "rb"))
    small, large = read_all(open_images(tmp_path / "set.tar")).values()
    assert len(small) == 500 and "501 bytes are more than the 500 that are read" in str(large)


def test_weights_are_as_large_as_their_file(tmp_path):
    """A file of a kilobyte can hold a tensor of a terabyte, all of it one number; a compressed one unpacks to any size."""
    torch.save({"weight": torch.zeros(1).expand(10**12)}, tmp_path / "wide.pt")
    torch.save({"weight": torch.zeros(3, 3).to_sparse()}, tmp_path / "sparse.pt")
    torch.save({"weight": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    for name, message in {
        "wide": "larger than what the file holds",
        "sparse": "larger than",
        "packed": "compressed",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_weights(tmp_path / f"{name}.pt")
    assert open_weights(tmp_path / "plain.pt")["weight"].shape == (10**6,)


def test_members_of_a_tar_write_nothing_and_link_to_nothing(tmp_path):
    """`../` in a name names a sample; links, devices and sparse files, which claim any size, are passed over."""
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, kind in (
            ("../../up.png", tarfile.REGTYPE),
            ("/abs.png", tarfile.REGTYPE),
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("device.png", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    assert sorted(read_all(open_images(tmp_path / "set.tar"))) == [
        f"{tmp_path}/set.tar/../../up",
        f"{tmp_path}/set.tar//abs",
    ]
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------ no code runs


class Canary:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.fixture
def canary(tmp_path):
    """An object whose pickle leaves a trace where one is loaded; the test fails if there is one at its end."""
    trace = tmp_path / "a pickle ran"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(_pickled(Canary(trace))), weights_only=True)
    pickle.loads(pickle.dumps(Canary(trace)))  # it would run
    trace.rmdir()
    yield Canary(trace)
    assert not trace.exists()


def _pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def copy_of(model_folder, target):
    shutil.copytree(model_folder, target)
    return target


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "epoch_1.pt", "adapter_model.bin"]
)
def test_no_pickle_runs_where_a_model_is_opened(name, canary, model_folder, tmp_path):
    folder = copy_of(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if not name.startswith("pytorch"):
        (folder / "config.json").unlink()
    if name.startswith("adapter"):
        adapter = {"base_model_name_or_path": str(model_folder), "peft_type": "LORA", "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / name).write_bytes(_pickled({"state_dict": {"logit_scale": torch.ones(()), "visual.x": canary}}))
    for attempt in (
        lambda: CocaModel.from_pretrained(folder),
        lambda: CocaForConditionalGeneration.from_pretrained(folder),
        lambda: AutoModel.from_pretrained(folder),
        lambda: pipeline("coca-vqa", model=str(folder)),
        lambda: convert(folder, tmp_path / "converted"),
        lambda: convert_to_open_clip(folder, tmp_path / "converted"),
        lambda: load_for_inference(folder, CocaModel),
        lambda: CocaIndex(str(folder)).search("a"),
    ):
        with pytest.raises((OSError, ValueError, RuntimeError, pickle.UnpicklingError)):
            attempt()
    with pytest.raises(ValueError, match="is refused: more than tensors is pickled in it"):
        convert(folder / name, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_no_pickle_runs_where_timm_could_load_it(canary, tmp_path, tiny_config):
    """transformers hands `model_args` of a config to `timm.create_model`, which loads a `checkpoint_path`."""
    (tmp_path / "weights.pth").write_bytes(_pickled(canary))
    vision_config = {"model_type": "timm_wrapper", "architecture": "test_resnet"}
    for changes, message in (
        ({"model_args": {"checkpoint_path": str(tmp_path / "weights.pth")}}, "must not have checkpoint_path"),
        ({"model_args": {"pretrained_cfg": {"file": str(tmp_path / "weights.pth")}}}, "must not have pretrained_cfg"),
        ({"architecture": "hf-hub:someone/something"}, "must be one of timm's own"),
        ({"architecture": f"local-dir:{tmp_path}"}, "must be one of timm's own"),
    ):
        with pytest.raises(Exception, match=message):
            CocaConfig(**{**tiny_config().to_dict(), "vision_config": {**vision_config, **changes}})


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin"]
)
def test_no_pickle_runs_where_a_training_is_resumed(name, canary, model_folder, tmp_path):
    processor = CocaProcessor.from_pretrained(model_folder)
    rows = [{"image": Image.new("RGB", (8, 8), color), "text": "a red square"} for color in ("red", "blue")]

    def trainer():
        settings = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(tmp_path / "out", per_device_train_batch_size=2, **settings)
        model = CocaForConditionalGeneration.from_pretrained(model_folder)
        return CocaTrainer(
            model=model,
            args=arguments,
            data_collator=CocaDataCollator(processor),
            train_dataset=rows,
            callbacks=[EmaCallback()],
        )

    trainer().train()
    checkpoint = tmp_path / "out/checkpoint-1"
    assert name == "pytorch_model.bin" or (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(_pickled({"state": canary, "python": canary}))
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    if name == "training_args.bin":  # is written, and never read
        assert trainer().train(resume_from_checkpoint=str(checkpoint)).global_step == 2
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trainer().train(resume_from_checkpoint=str(checkpoint))


def test_no_pickle_runs_in_arrays(canary, model_folder, tmp_path):
    objects = np.array([canary], dtype=object)
    index = CocaIndex(str(model_folder))
    index.add(np.eye(4), list("abcd"))
    index.save(tmp_path / "index")
    (data,) = (tmp_path / "index").glob("data-*")
    np.save(data / "removed.npy", objects, allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        CocaIndex.load(tmp_path / "index")
    np.save(tmp_path / "features.npy", objects, allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects in dtype"):
        FrozenFeatures(tmp_path / "features.npy", np.zeros(1, int))


def test_no_pickle_runs_in_shards_of_training_data(canary, tmp_path):
    """Decoders of other readers of WebDataset unpickle members by their name."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    array = io.BytesIO()
    np.save(array, np.array([canary], dtype=object), allow_pickle=True)
    for extension, content in {
        "pickle": pickle.dumps(canary),
        "pyd": pickle.dumps(canary),
        "pkl": pickle.dumps(canary),
        "pth": _pickled(canary),
        "npy": array.getvalue(),
    }.items():
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            for name, data in (("0.png", buffer.getvalue()), (f"0.{extension}", content)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        with contextlib.suppress(ValueError, pickle.UnpicklingError, datasets.exceptions.DatasetGenerationError):
            list(
                load_data(data_files={"train": str(tmp_path / "set.tar")}, image_column="png", streaming=True)["train"]
            )
        (image,) = read_all(open_images(tmp_path / "set.tar", keep=[extension])).values()
        assert image == buffer.getvalue()


def test_code_beside_a_checkpoint_runs_only_with_the_flag(model_folder, tmp_path, monkeypatch):
    """Nobody is asked either, as transformers does on a terminal."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    trace = tmp_path / "code ran"
    code = f"import os\nos.mkdir({str(trace)!r})\nclass Other: pass\n"

    def variant(file, change):
        folder = copy_of(model_folder, tmp_path / f"variant{len(list(tmp_path.glob('variant*')))}")
        (folder / "other.py").write_text(code)
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
        return folder

    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"), "other.Other")
    auto_map |= {"AutoImageProcessor": "other.Other", "AutoTokenizer": ["other.Other", None]}
    variants = [
        variant("config.json", lambda content: content.update(auto_map=auto_map)),
        variant("config.json", lambda content: content["vision_config"].update(auto_map=auto_map)),
        variant("config.json", lambda content: content["vision_config"].update(auto_map=auto_map, model_type="other")),
        variant("processor_config.json", lambda content: content.update(auto_map=auto_map, processor_class="Other")),
        variant(
            "processor_config.json",
            lambda content: content["image_processor"].update(auto_map=auto_map, image_processor_type="Other"),
        ),
        variant("tokenizer_config.json", lambda content: content.update(auto_map=auto_map, tokenizer_class="Other")),
        variant(
            "config.json",
            lambda content: content.update(
                custom_pipelines={"image-captioning": {"impl": "other.Other", "pt": ["AutoModelForImageTextToText"]}}
            ),
        ),
    ]
    refused = 0
    for folder in variants:
        for model_class in (CocaModel, CocaForConditionalGeneration):
            try:
                load_for_inference(folder, model_class)
            except ValueError as error:
                refused += "trust_remote_code=True" in str(error)
        with contextlib.suppress(ValueError):
            load_model(ModelArguments(model_name_or_path=str(folder)))
        with contextlib.suppress(ValueError):
            pipeline("image-captioning", model=str(folder), trust_remote_code=False)
    assert refused == 2 and not trace.exists()
    with contextlib.suppress(Exception):
        AutoImageProcessor.from_pretrained(variants[4], trust_remote_code=True)
    assert trace.exists()  # the code is found, and runs where the user says so


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.getcwd() }}"]
)
def test_a_chat_template_reaches_no_python(template, model_folder):
    processor = CocaProcessor.from_pretrained(model_folder)
    processor.chat_template = template
    with pytest.raises(jinja2.exceptions.TemplateError):
        processor.apply_chat_template([{"role": "user", "content": "what is it?"}])


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "dill.load", "dill.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle",
    "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load", "extractall",
    "extract", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip


def test_the_code_holds_no_call_that_runs_data():
    """Every call in the package, the examples and the tools: what it is called by, and with what."""
    root = Path(__file__).parents[2]
    files = [
        path
        for name in ("modeling_coca", "examples", "benchmarks", "hub_configs")
        for path in (root / name).rglob("*.py")
    ]
    found = []
    for path in [*files, root / "tests/matrix.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                found += [
                    f"{path}:{node.lineno}: {name}({problem})"
                    for problem, holds in {
                        "": name in FORBIDDEN_CALLS or name.rsplit(".")[-1] in ("extractall", "unpack_archive"),
                        "weights_only": name.endswith("torch.load") and keywords.get("weights_only") != "True",
                        "allow_pickle": keywords.get("allow_pickle", "False") != "False",
                        "shell": keywords.get("shell", "False") != "False",
                        "trust_remote_code": keywords.get("trust_remote_code") == "True",
                        "autoescape": name.endswith("Environment") and "autoescape" not in keywords,
                    }.items()
                    if holds
                ]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                found += [
                    f"{path}:{node.lineno}: import {n}"
                    for n in names
                    if n in ("pickle", "dill", "marshal", "shelve", "joblib")
                ]
    assert len(files) > 60 and found == []


# ------------------------------------------------------------------------------------- indexes, and unfinished outputs


@pytest.fixture
def index(model_folder, tmp_path):
    """The folder of an index of four images."""
    made = CocaIndex(str(model_folder))
    made.add(np.random.default_rng(0).standard_normal((4, made.embedder.model.config.projection_dim)), list("abcd"))
    made.save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("data", ["../elsewhere", "{root}/elsewhere", "..", "data-x/../../elsewhere"])
def test_an_index_names_no_folder_but_its_own(data, index, tmp_path):
    settings = json.loads((index / "index.json").read_text())
    shutil.copytree(index / settings["data"], tmp_path / "elsewhere")
    (index / "index.json").write_text(json.dumps({**settings, "data": data.format(root=tmp_path)}))
    with pytest.raises(ValueError, match="no folder beside it"):
        CocaIndex.load(index)


def test_an_index_whose_structure_is_not_that_of_its_rows_is_refused(index):
    (data,) = index.glob("data-*")
    size = CocaIndex.load(index).embedding_size
    structures = [
        faiss.IndexFlatIP(size),  # no rows
        faiss.IndexFlatIP(size + 1),
        faiss.IndexFlatL2(size),
        faiss.IndexHNSWFlat(size, 8, faiss.METRIC_INNER_PRODUCT),
    ]
    for structure in structures:
        structure.add(np.zeros((0 if structure is structures[0] else 4, structure.d), np.float32))
        faiss.write_index(structure, str(data / "index.faiss"))
        with pytest.raises(ValueError, match=r"exact of 4 rows of .* make the index anew"):
            CocaIndex.load(index)


def test_an_index_with_neighbours_that_are_not_there_is_refused(index):
    """FAISS before 1.14 reads it, and a search in it ends the process."""
    made = CocaIndex.load(index)
    made.rebuild("hnsw")
    made.save(index)
    (data,) = index.glob("data-*")
    content = (data / "index.faiss").read_bytes()
    neighbours = faiss.vector_to_array(made._faiss.faiss_index.hnsw.neighbors)
    wrong = np.where(neighbours >= 0, 2**30, neighbours).astype(neighbours.dtype)
    assert neighbours.tobytes() in content
    (data / "index.faiss").write_bytes(content.replace(neighbours.tobytes(), wrong.tobytes()))
    with pytest.raises(RuntimeError, match="validate_HNSW"):
        CocaIndex.load(index)


def test_ids_of_an_index_from_the_hub_lead_nowhere_else(places, model_folder, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    made = CocaIndex(str(model_folder))
    rows = np.eye(made.embedder.model.config.projection_dim)[:4]
    ids = ["own.png", str(places / "secret/private.png"), "../secret/private.png", "link.png"]
    pictures = [{"bytes": None, "path": str(places / "secret/private.png")}] * 4
    made.add(rows, ids)
    made.dataset = made.dataset.add_column("picture", pictures, feature=datasets.Image())
    (places / "hub/index").mkdir(parents=True)
    made.dataset.to_parquet(places / "hub/data/train-0.parquet")
    made.rebuild()
    made._faiss.save(places / "hub/index/index.faiss")
    (places / "hub/index/index.json").write_text(json.dumps(made._settings()))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(places / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", places / "cache")
    monkeypatch.chdir(places / "data")
    loaded = CocaIndex.load("someone/index")
    hits = loaded.search("a red square", k=4, rerank=4)
    assert [hit.id for hit in hits if hit.log_prob is not None] == ["own.png"]
    assert caplog.text.count("leads out of .: say by `image_root`") == 3
    assert all(isinstance(hit.metadata["picture"], dict) for hit in hits)  # no picture was opened
    page = pytest.importorskip("modeling_coca.app.page", reason="gradio is not installed", exc_type=ImportError)
    shown = page._Verbs(loaded.embedder.model, loaded.embedder.processor, loaded).search("a red square", None, False)
    assert shown.count("<img ") == 1 and shown.count("no picture to show") == 3
    hits = CocaIndex.load("someone/index", image_root=places).search("a red square", k=4, rerank=4)
    assert all(hit.log_prob is not None for hit in hits)


@pytest.mark.parametrize(
    "link", [".out.jsonl.coca", ".out.jsonl.coca/shard-000000.jsonl", ".out.jsonl.coca/.part-000000.jsonl.tmp"]
)
def test_an_unfinished_output_writes_through_no_link(link, model_folder, photos, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir() if link.endswith(".coca") else victim.write_text("keep me\n")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(victim)
    with pytest.raises(ValueError, match="is a link: delete it, or choose another output"):
        embed_images(photos, tmp_path / "out.jsonl", model=model_folder, num_workers=0)
    assert list(victim.iterdir()) == [] if victim.is_dir() else victim.read_text() == "keep me\n"


# -------------------------------------------------------------------------------------------------------------- texts


def test_texts_in_templates_are_only_put_in(model_folder, tiny_config):
    processor = CocaProcessor.from_pretrained(model_folder)
    template = "a {} {0.__class__.__init__.__globals__} {x}"
    seen = []
    evaluator = ZeroShotClassificationEvaluator(
        processor, [{"label": 0}], class_names=["{y}", "cat"], templates=[template]
    )
    evaluator.encode_texts = lambda model, texts: seen.extend(texts) or torch.ones(2, 4)
    evaluator.class_embeddings(None)
    assert seen == [template.replace("{}", "{y}"), template.replace("{}", "cat")]


def test_texts_in_pictures_are_no_formulas(tmp_path):
    draw_confusion(np.eye(2, dtype=int), ["$\\frac$", "<b> & $5"], tmp_path / "confusion.svg")
    assert "&lt;b&gt; &amp; $5" in (tmp_path / "confusion.svg").read_text()


def test_texts_in_model_cards_are_no_markup(tiny_config, tmp_path):
    model = CocaModel(tiny_config())
    name = 'x"); import os; os.system("ls")\n---\nlicense: mit\n---\n# <script>alert(1)</script>\n```'
    card = model_card(model, name, license="apache-2.0\ntags: [x]", eval_results=None)
    assert card.data.license == "apache-2.0\ntags: [x]" and "<script>" not in str(card).split("## Use")[0]
    (code,) = re.findall(r"^(`{3,})python\n(.*?)^\1$", str(card), flags=re.DOTALL | re.MULTILINE)
    (call,) = [
        n for n in ast.walk(ast.parse(code[1])) if isinstance(n, ast.Call) and n.keywords and n.func.id == "pipeline"
    ]
    assert {k.arg: ast.literal_eval(k.value) for k in call.keywords} == {"model": name}
    assert cell("a|b\n<img src=x>") == "a\\|b &lt;img src=x>"
    assert code_block("bash", "a\n````\nb") == "`````bash\na\n````\nb\n`````"


def test_texts_on_the_terminal_are_no_commands(coca, photos, model_folder, tmp_path):
    name = "a\x1b]0;title\x07\x9b31m\u202egnp.png"
    shutil.copy(photos / "00.png", tmp_path / name)
    (tmp_path / f"bad{name}").write_text("no picture")
    shown = "a\\x1b]0;title\\x07\\x9b31m\\u202egnp.png"
    for arguments in (["caption"], ["classify", "--classes", "cat, dog"], ["ask"]):
        extra = ["what is it?"] if arguments == ["ask"] else []
        code, out, err = coca(*arguments, tmp_path, *extra, "--num_workers", 0)
        assert code == 0 and f"{tmp_path}/{shown}\t" in out and f"unreadable: {tmp_path}/bad{shown}: no image" in err
        assert not set("\x1b\x07\x9b\u202e") & set(out + err)
    code, _, err = coca("caption", tmp_path / f"none{name}")
    assert code == 1 and f"none{shown}" in err
