"""push_to_hub and from_pretrained against a Hub on loopback, in processes of their own."""

import json
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.hub import export_to_folder

# Pushes as it is told to by lines on stdin, and says on stdout what happened
PUSH = """
import sys
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.evaluation import CaptioningEvaluator
from modeling_coca.hub import push_to_hub
from modeling_coca.training import CocaDataCollator, CocaTrainer

model = CocaForConditionalGeneration.from_pretrained(sys.argv[1])
processor = CocaProcessor.from_pretrained(sys.argv[1])


def say(answer):
    print(">", answer, flush=True)


for line in sys.stdin:
    command, *arguments = line.split()
    if command == "push":
        try:
            card = ModelCard("---\\nlicense: mit\\n---\\n# Fox\\n") if len(arguments) > 1 else None
            info = push_to_hub(model, processor, "someone/fox", card, max_shard_size=arguments[0])
            say(info.oid)
        except Exception as error:
            say(f"failed: {type(error).__name__}")
    elif command == "aside":
        HfApi().create_branch("someone/fox", branch="next")
        say(push_to_hub(model, processor, "someone/fox", revision="next").oid)
        say(push_to_hub(model, processor, "someone/fox", create_pr=True).oid)
    elif command == "change":
        model.lm_head.weight.data.add_(1)
    elif command == "pull":
        loaded = AutoModelForImageTextToText.from_pretrained("someone/fox")
        assert type(loaded) is CocaForConditionalGeneration
        assert type(AutoProcessor.from_pretrained("someone/fox")) is CocaProcessor
        same = all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
        say(same)
    elif command == "train":
        trainer = CocaTrainer(
            model,
            TrainingArguments("fox-trained", max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no"),
            CocaDataCollator(processor),
            train_dataset=[{"image": Image.new("RGB", (32, 32)), "text": "a fox"}],
            eval_dataset=[{"image": Image.new("RGB", (32, 32)), "text": "a fox"}],
            callbacks=[CaptioningEvaluator(processor, [{"image": Image.new("RGB", (32, 32)), "text": "a fox"}])],
        )
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub(license="mit")
        say("trained")
    elif command == "plain":
        model.push_to_hub("plain", tags=["fox"])
        processor.push_to_hub("plain")
        loaded = CocaForConditionalGeneration.from_pretrained("someone/plain")
        assert type(CocaProcessor.from_pretrained("someone/plain")) is CocaProcessor
        same = all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
        say(same)
"""

PULL = """
import json, sys
import torch, transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

old, weights, weights_before = sys.argv[1:]
trust = {"trust_remote_code": True}


def check(model, file):
    expected = load_file(file)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert type(model).__module__.startswith("transformers_modules.someone.fox."), type(model)


check(AutoModelForImageTextToText.from_pretrained("someone/fox", **trust), weights)
check(AutoModelForImageTextToText.from_pretrained("someone/fox", revision=old, **trust), weights_before)
processor = AutoProcessor.from_pretrained("someone/fox", **trust)
captioner = pipeline("image-captioning", model="someone/fox", **trust)
(caption,) = captioner(Image.new("RGB", (32, 32), "red"), max_new_tokens=4)
vqa = pipeline("coca-vqa", model="someone/fox", **trust)
folders = [snapshot_download("someone/fox", revision=revision) for revision in (None, old)]
print(json.dumps([folders, processor(text=["a fox"])["input_ids"], caption["generated_text"]]))
"""


@pytest.fixture
def folder(config, processor, tmp_path):
    first = export_to_folder(CocaForConditionalGeneration(config()), processor, tmp_path / "first")
    # What was loaded writes some fields more than what was made
    loaded = CocaForConditionalGeneration.from_pretrained(first), CocaProcessor.from_pretrained(first)
    return export_to_folder(*loaded, tmp_path / "model")


def test_push_and_pull(hub, folder, processor, start_python, run_python, tmp_path):
    process = start_python(PUSH, folder, hub=hub)

    def tell(line):
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    def ask(line):
        tell(line)
        return hear()

    def hear():
        for answer in process.stdout:
            if answer.startswith("> "):  # and not a line of the trainer's log
                return answer[2:].strip()
        raise AssertionError(process.communicate()[1])

    # a first push, in shards
    first = ask("push 100KB card")
    assert hub.refs["someone/fox"] == {"main": first}
    files = hub.files("someone/fox")
    exported = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
    shards = {name for name in files if name.startswith("model-")}
    assert len(shards) > 2
    # (transformers writes into the tokenizer's file, too, whether it was loaded offline)
    assert json.loads(files["tokenizer_config.json"])["auto_map"]["AutoTokenizer"]
    apart = {".gitattributes", "README.md", "model.safetensors.index.json", "tokenizer_config.json"}
    others = files.keys() - shards - apart
    assert {name: files[name] for name in others} == {
        name: exported[name] for name in exported.keys() - {"model.safetensors", "tokenizer_config.json"}
    }
    assert files["README.md"] == b"---\nlicense: mit\n---\n# Fox\n"
    asked = [request.split("/")[0] + request.rsplit("/", 1)[1] for request in hub.requests]
    assert [asked.count(name) for name in ("POST create", "POST batch")] == [1, 1]
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == len(shards)
    assert [request for request in hub.requests if "/commit/" in request] == [
        "POST /api/models/someone/fox/commit/main"
    ]

    # a push that is refused half-way, and again once the Hub is well
    tell("change")
    start = hub.uploads
    hub.refuse_upload = lambda number: 400
    assert ask("push 100KB") == "failed: RuntimeError"
    assert hub.uploads > start
    assert hub.refs["someone/fox"] == {"main": first} and hub.files("someone/fox") == files
    hub.refuse_upload = lambda number: None
    second = ask("push 100KB")
    assert hub.refs["someone/fox"] == {"main": second}
    changed = {name for name, content in hub.files("someone/fox").items() if content != files.get(name)}
    assert changed and changed < shards  # others were there already

    # to a branch and as a pull request
    tell("change")
    aside, proposed = ask("aside"), hear()
    assert hub.refs["someone/fox"] == {"main": second, "next": aside, "refs/pr/2": proposed}

    # in one file: the shards go
    third = ask("push 1GB")
    names = hub.files("someone/fox").keys()
    assert names == exported.keys() | {".gitattributes", "README.md"}
    assert hub.files("someone/fox")["README.md"] == files["README.md"]  # stays where no other is given
    assert ask("pull") == "True"
    assert ask("plain") == "True"
    assert b"fox" in hub.files("someone/plain")["README.md"]

    assert ask("train") == "trained"
    card = ModelCard(hub.files("someone/fox-trained")["README.md"].decode())
    assert {result.metric_name for result in card.data.eval_results} == {"caption_exact", "bleu4", "cider_d", "rouge_l"}
    assert card.data.license == "mit"

    # a process that dies while it uploads
    tell("change")
    arrived, gone = threading.Event(), threading.Event()

    def die(number):
        arrived.set()
        gone.wait(60)
        return 400

    hub.refuse_upload = die
    tell("push 1GB")
    assert arrived.wait(60)
    process.kill()
    process.communicate()
    gone.set()
    assert hub.refs["someone/fox"]["main"] == third

    # without the package
    weights = load_file(folder / "model.safetensors")
    before = tmp_path / "before.safetensors"
    save_file(weights, before)
    weights["lm_head.weight"] += 1
    weights["lm_head.weight"] += 1
    now = tmp_path / "now.safetensors"
    save_file(weights, now)
    folders, ids, caption = json.loads(run_python(PULL, first, now, before, hub=hub, package=False).splitlines()[-1])
    assert ids == processor(text=["a fox"])["input_ids"]
    assert isinstance(caption, str)
    for path, revision in zip(folders, ("main", first), strict=True):
        assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == hub.files("someone/fox", revision)
