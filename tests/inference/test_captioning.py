"""Captions and their figures; and an output that survives kills, holes and company."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from modeling_coca import CocaForConditionalGeneration, CocaModel, CocaProcessor, linear_coca
from modeling_coca.inference import CocaCaptioner, ImageLoader, caption_images, captioning, open_images, read_rows
from modeling_coca.inference.journal import Journal


@pytest.fixture(scope="module")
def model(model_folder):
    return CocaForConditionalGeneration.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def processor(model_folder):
    return CocaProcessor.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def pixels(processor, photos):
    paths = sorted(str(path) for path in photos.rglob("*.*"))
    return processor(images=paths, return_tensors="pt")["pixel_values"]


@pytest.fixture
def quick(photos, model_folder):
    """`caption_images` on the photos, in this process."""

    def run(output=None, **kwargs):
        options = {"model": model_folder, "num_workers": 0, "max_new_tokens": 6, "show_progress": False}
        return caption_images(photos, output, **{**options, **kwargs})

    return run


def prompt_ids(processor, prompt, rows):
    return torch.tensor(processor.tokenizer(prompt)["input_ids"][:-1]).expand(rows, -1)


def up_to_eos(ids, processor):
    """What was written: `generate` goes on with padding, or with EOS after beam search."""
    eos = ids == processor.tokenizer.eos_token_id
    return (eos.cumsum(-1) - eos.long()) == 0


# --------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("logits_to_keep", [0, 2**27])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 3}, {"prompt": "a photo of"}, {"max_new_tokens": 3}, {"prompt": "a", "num_beams": 2}]
)
def test_log_prob_is_that_of_generation(model, processor, pixels, kwargs, logits_to_keep, monkeypatch):
    monkeypatch.setattr(captioning, "_LOGITS_TO_KEEP", logits_to_keep)
    decoded = []
    monkeypatch.setattr(
        CocaCaptioner,
        "_log_probs_of",
        lambda *args, _inner=CocaCaptioner._log_probs_of: decoded.append(1) or _inner(*args),
    )
    rows = CocaCaptioner(model, processor, length_penalty=0.0, **kwargs)(pixels)
    assert len(decoded) == (logits_to_keep == 0)
    prompt = prompt_ids(processor, kwargs.get("prompt", ""), len(pixels))
    options = {name: value for name, value in kwargs.items() if name != "prompt"}
    out = model.generate(
        pixel_values=pixels,
        input_ids=prompt,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
        **options,
    )
    beams = {"beam_indices": out.beam_indices} if "num_beams" in kwargs else {}
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=not beams, **beams)
    generated = out.sequences[:, prompt.shape[1] :]
    counted = up_to_eos(generated, processor)
    lengths = counted.sum(-1).tolist()
    assert [row["num_tokens"] for row in rows] == lengths
    if "max_new_tokens" not in kwargs and "prompt" not in kwargs:
        assert len(set(lengths)) > 1  # some end earlier than others
    expected = scores[:, : counted.shape[1]].masked_fill(~counted, 0).sum(-1)
    torch.testing.assert_close(torch.tensor([row["log_prob"] for row in rows]), expected, atol=1e-4, rtol=1e-5)
    if beams:
        torch.testing.assert_close(expected, out.sequences_scores, atol=1e-4, rtol=1e-5)
    texts = processor.batch_decode(out.sequences, skip_special_tokens=True)
    assert [row["caption"] for row in rows] == texts


def test_score_and_embedding_are_those_of_the_dual_encoder(model_folder, model, processor, pixels):
    rows = CocaCaptioner(model, processor, embeddings=True, max_new_tokens=4)(pixels)
    ids = model.generate(pixel_values=pixels, max_new_tokens=4, do_sample=False)
    ids = torch.cat([ids, torch.full((len(ids), 1), processor.tokenizer.eos_token_id)], dim=1)
    mask = up_to_eos(ids, processor)
    with torch.no_grad():
        out = CocaModel.from_pretrained(model_folder).eval()(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    torch.testing.assert_close(torch.tensor([r["score"] for r in rows]), (out.text_embeds * out.image_embeds).sum(-1))
    embeddings = torch.stack([torch.from_numpy(row["embedding"]) for row in rows])
    torch.testing.assert_close(embeddings, out.image_embeds)


def test_each_image_is_encoded_once(model, processor, pixels):
    seen = []
    handle = model.model.vision_model.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[0]))
    CocaCaptioner(model, processor, num_beams=3, best_of=2, num_captions=2, embeddings=True)(pixels)
    handle.remove()
    assert seen == [12]


def test_best_of_keeps_the_captions_that_fit(model, processor, pixels):
    torch.manual_seed(0)
    rows = CocaCaptioner(model, processor, best_of=6, num_captions=3)(pixels[:4])
    torch.manual_seed(0)
    prompts = prompt_ids(processor, "", 4)
    ids = model.generate(pixel_values=pixels[:4], input_ids=prompts, do_sample=True, num_return_sequences=6)
    texts = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    for i, row in enumerate(rows):
        scores = [caption["score"] for caption in row["captions"]]
        assert scores == sorted(scores, reverse=True) and scores[0] == row["score"]
        assert {caption["caption"] for caption in row["captions"]} <= set(texts[6 * i : 6 * i + 6])
        assert len({caption["caption"] for caption in row["captions"]}) == 3
    single = CocaCaptioner(model, processor, num_beams=4, best_of=4)
    assert single.generation_kwargs["do_sample"] is False  # beams are candidates enough
    ids = model.generate(pixel_values=pixels[:4], num_beams=4, num_return_sequences=4, do_sample=False)
    text = F.normalize(model.get_text_features(ids, up_to_eos(ids, processor).long()).pooler_output, dim=-1)
    image = model.get_image_features(pixels[:4]).image_embeds
    ended = (ids == processor.tokenizer.eos_token_id).any(-1).view(4, 4).all(-1)
    assert ended.any()
    best = torch.einsum("bnd,bd->bn", text.view(4, 4, -1), image).amax(-1)
    found = torch.tensor([row["score"] for row in single(pixels[:4])])
    torch.testing.assert_close(found[ended], best[ended])
    with pytest.raises(ValueError, match=r"`num_captions` \(3\) must be from 1 to `best_of` \(2\)"):
        CocaCaptioner(model, processor, best_of=2, num_captions=3)


def test_batches_and_workers_change_nothing(quick):
    alone = quick(batch_size=1)
    assert [row["id"] for row in alone] == sorted(row["id"] for row in alone) and len(alone) == 12
    for kwargs in ({"batch_size": 5}, {"batch_size": 4, "num_workers": 2, "source_kwargs": {"shard_size": 3}}):
        rows = quick(**kwargs)
        assert [(row["id"], row["caption"]) for row in rows] == [(row["id"], row["caption"]) for row in alone]
        log_probs = [[row["log_prob"] for row in some] for some in (rows, alone)]
        torch.testing.assert_close(*map(torch.tensor, log_probs), atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- output


def without_figures(rows):
    return [(row["id"], row.get("caption"), row.get("error")) for row in rows]


@pytest.mark.parametrize("batch_size", [2, 64], ids=["many", "few"])
def test_linear_layers_are_packed_for_many_images(quick, model_folder, processor, batch_size):
    model = CocaForConditionalGeneration.from_pretrained(model_folder).eval()
    rows = quick(model=model, processor=processor, batch_size=batch_size)
    if linear_coca._HAS_ONEDNN:
        assert (model.lm_head._packed is not None) == (batch_size == 2)
    plain = quick(batch_size=64)
    assert [row["caption"] for row in rows] == [row["caption"] for row in plain]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "folder", "folder of parquet"])
def test_outputs_hold_the_rows_in_order(name, quick, photos, tmp_path):
    (tmp_path / "list.csv").write_text("\n".join(["path", *sorted(map(str, photos.glob("*.jpg"))), "gone.png"]))
    kwargs = {"embeddings": True, "output_format": "parquet" if "of parquet" in name else "jsonl"}
    plain = quick(embeddings=True)
    done = quick(tmp_path / name, source_kwargs={"shard_size": 5}, **kwargs)
    assert done == {"output": str(tmp_path / name), "images": 12, "failed": []}
    rows = list(read_rows(tmp_path / name))
    assert without_figures(rows) == without_figures(plain)
    for row, expected in zip(rows, plain, strict=True):
        assert row["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert row["embedding"] == pytest.approx(expected["embedding"].tolist(), abs=1e-5)
    assert [path.name for path in tmp_path.glob(".*")] == []  # nothing is left of the work
    if name == "folder":
        assert sorted(path.name for path in (tmp_path / name).glob("[!.]*")) == [
            f"part-{number:06d}.jsonl" for number in range(3)
        ]
    with pytest.raises(FileExistsError, match="is there, and complete"):
        quick(tmp_path / name, **kwargs)
    quick(tmp_path / name, overwrite=True, **kwargs)
    assert without_figures(read_rows(tmp_path / name)) == without_figures(plain)


def test_unreadable_images_have_their_row(model_folder, photos, tmp_path):
    (tmp_path / "list.csv").write_text(
        "\n".join(["path,note", f"{photos}/00.png,x", "gone.png,y", f"{photos}/03.png,z"])
    )
    kwargs = {"model": model_folder, "num_workers": 0, "show_progress": False}
    source_kwargs = {"keep": ["note"], "shard_size": 2, "image_root": tmp_path.parent}
    done = caption_images(tmp_path / "list.csv", tmp_path / "out.parquet", source_kwargs=source_kwargs, **kwargs)
    assert done["images"] == 3 and [name for name, _ in done["failed"]] == [str(tmp_path / "gone.png")]
    rows = list(read_rows(tmp_path / "out.parquet"))
    assert [row["note"] for row in rows] == ["x", None, "z"]
    assert rows[1]["caption"] is None and "No such file" in rows[1]["error"]
    assert rows[0]["error"] is rows[2]["error"] is None
    assert pq.read_schema(tmp_path / "out.parquet").names[:2] == ["id", "note"]


WORK = """
import sys
from modeling_coca.inference import caption_images
caption_images(sys.argv[1], sys.argv[2], model=sys.argv[3], batch_size=2, num_workers=2, max_new_tokens=6,
               source_kwargs={"shard_size": 7}, show_progress=False)
"""


def test_a_job_that_was_killed_goes_on_where_it_was(quick, photos, model_folder, tmp_path, monkeypatch):
    plain = quick()
    many = tmp_path / "many"  # so that there is time to kill it
    many.mkdir()
    for number in range(10):
        for path in photos.glob("*.png"):
            os.link(path, many / f"{number}-{path.name}")
    total = len(list(many.iterdir()))
    output, work = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.coca"
    process = subprocess.Popen([sys.executable, "-c", WORK, str(many), str(output), str(model_folder)])
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in work.glob("shard-*.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    journals = [line for path in work.glob("*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    rows_before = [row for line in journals if line.endswith(b"\n") for row in json.loads(line)]
    assert 0 < len(rows_before) < total
    with open(next(work.glob("shard-*.jsonl")), "ab") as journal:
        journal.write(journals[0][:-9])  # as if it had been killed within a line

    captioned = []
    call = CocaCaptioner.__call__
    monkeypatch.setattr(
        CocaCaptioner, "__call__", lambda self, batch: captioned.append(len(batch)) or call(self, batch)
    )
    options = {"model": model_folder, "batch_size": 2, "max_new_tokens": 6, "show_progress": False, "num_workers": 0}
    done = caption_images(str(many), output, source_kwargs={"shard_size": 7}, **options)
    assert done["images"] == total and sum(captioned) == total - len(rows_before)  # none twice
    rows = list(read_rows(output))
    assert [row["id"] for row in rows] == sorted(str(path) for path in many.iterdir())  # none lost
    captions = {row["id"].rsplit("/")[-1]: row["caption"] for row in plain}
    assert all(row["caption"] == captions[row["id"].rsplit("-")[-1]] for row in rows)


def test_processes_share_the_work_without_talking(quick, photos, model_folder, tmp_path, monkeypatch):
    plain = quick()
    results = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        results.append(quick(tmp_path / "out.parquet", batch_size=4))
        if rank == 1:
            assert not (tmp_path / "out.parquet").exists()
    assert results[0] is None and results[1]["images"] == 12
    assert without_figures(read_rows(tmp_path / "out.parquet")) == without_figures(plain)
    monkeypatch.setenv("RANK", "1")
    assert quick(tmp_path / "out.parquet", batch_size=4) is None  # came too late, and nothing is left to do
    with pytest.raises(ValueError, match="several processes"):
        quick(overwrite=True, output=tmp_path / "out.parquet")


def test_a_job_is_taken_up_with_its_own_settings_only(quick, tmp_path, monkeypatch):
    def stop(self, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CocaCaptioner, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path / "out.jsonl", source_kwargs={"shard_size": 4})
    with pytest.raises(ValueError, match=r"was begun with another `num_beams` \(None, now 2\)"):
        quick(tmp_path / "out.jsonl", num_beams=2)
    with pytest.raises(ValueError, match="another `prompt`"):
        quick(tmp_path / "out.jsonl", prompt="a")
    monkeypatch.setenv("WORLD_SIZE", "3")  # more processes: fine, the shards stay the same
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        done = quick(tmp_path / "out.jsonl", batch_size=3)
    assert done["images"] == 12


def test_two_jobs_cannot_write_to_one_output(tmp_path):
    first, second = (Journal(tmp_path / "out.jsonl", {}, num_shards=1) for _ in range(2))
    first.begin(0, size=2)
    with pytest.raises(OSError, match="Another process is writing"):
        second.begin(0, size=2)


def test_lines_are_json_with_the_text_as_it_is(tmp_path):
    journal = Journal(tmp_path / "out.jsonl", {"any": ("thing", 1)}, num_shards=2)
    for shard in (1, 0):
        assert journal.begin(shard, size=1) == set()
        journal.write(shard, [(0, {"id": str(shard), "caption": "여우 🦊\n"})])
    assert journal.close()["images"] == 2
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert lines == ['{"id": "0", "caption": "여우 🦊\\n"}', '{"id": "1", "caption": "여우 🦊\\n"}']
    assert json.loads(lines[0])["caption"] == "여우 🦊\n"


def test_shards_of_a_folder_do_not_depend_on_processes(photos):
    assert [shard.size for shard in open_images(photos, shard_size=5)] == [5, 5, 2]


def finish(journal, num_shards=2):
    for shard in range(num_shards):
        if not journal.is_done(shard) and journal.begin(shard, size=1) == set():
            journal.write(shard, [(0, {"id": str(shard)})])
    return journal.close()


@pytest.mark.parametrize("name", ["out.jsonl", "folder"])
def test_what_a_kill_at_the_end_leaves_is_removed(name, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_tidy", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finish(Journal(tmp_path / name, {}, num_shards=2))
    with pytest.raises(FileExistsError, match="and complete"):
        Journal(tmp_path / name, {}, num_shards=2)
    if name == "folder":
        assert sorted(path.name for path in (tmp_path / name / ".coca").iterdir()) == [
            *("complete", "lock", "settings.json")
        ]
    else:
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_work_folder_that_is_half_removed_is_not_taken_up(tmp_path, monkeypatch):
    """It has notes of shards whose parts are gone; and its output may be gone, too, as `coca index` takes it away."""

    def half(folder, *args, **kwargs):
        if os.path.isdir(folder):
            next(Path(folder).glob("part-*")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("modeling_coca.inference.journal.shutil.rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            finish(Journal(tmp_path / "out.jsonl", {}, num_shards=2))
    (tmp_path / "out.jsonl").unlink()
    assert finish(Journal(tmp_path / "out.jsonl", {}, num_shards=2))["images"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_overwriting_that_was_cut_off_leaves_no_output_that_looks_complete(tmp_path, monkeypatch):
    finish(Journal(tmp_path / "folder", {}, num_shards=2))
    unlink, count = Path.unlink, []

    def killed(self, *args, **kwargs):
        if self.name.startswith("part-"):
            count.append(self)
            if len(count) == 2:
                raise KeyboardInterrupt
        unlink(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            Journal(tmp_path / "folder", {}, num_shards=2, overwrite=True)
    assert finish(Journal(tmp_path / "folder", {}, num_shards=2))["images"] == 2
    assert [row["id"] for row in read_rows(tmp_path / "folder")] == ["0", "1"]


def test_a_batch_that_was_cut_off_is_computed_again_as_a_whole(tmp_path):
    """Figures depend on the batch in their last digits."""
    journal = Journal(tmp_path / "out.jsonl", {}, num_shards=1)
    journal.begin(0, size=4)
    journal.write(0, [(0, {"id": "0"}), (1, {"id": "1"})])
    journal.write(0, [(2, {"id": "2"})])
    journal.release()
    path = tmp_path / ".out.jsonl.coca" / "shard-000000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-1])
    assert Journal(tmp_path / "out.jsonl", {}, num_shards=1).begin(0, size=4) == {0, 1}


def test_a_full_disk_is_told_with_the_file_and_the_work_goes_on(tmp_path):
    journal = Journal(tmp_path / "out.jsonl", {}, num_shards=2)
    journal.begin(0, size=2)
    journal.write(0, [(0, {"id": "0"})])
    real = journal._files[0]
    journal._files[0] = full = open("/dev/full", "wb")
    full_name = full.name
    with pytest.raises(OSError, match=f"^The disk is full: {full_name} could not be written"):
        journal.write(0, [(1, {"id": "1"})])
    journal.release()
    real.close()
    again = Journal(tmp_path / "out.jsonl", {}, num_shards=2)
    assert again.begin(0, size=2) == {0}
    again.write(0, [(1, {"id": "1"})])
    assert finish(again)["images"] == 3


def test_shards_of_the_asked_for_size_are_resumed_by_several_processes(quick, tmp_path, monkeypatch):
    """An earlier process had made them smaller, and a later one then refused its own command."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        done = quick(tmp_path / "out.jsonl", source_kwargs={"shard_size": 5})
    assert done["images"] == 12


def test_lack_of_memory_is_no_fault_of_an_image(quick, tmp_path, monkeypatch):
    def fail(source, at_least=None):
        raise MemoryError

    monkeypatch.setattr("modeling_coca.inference.loading.open_image", fail)
    with pytest.raises(MemoryError, match=r"none left to read .*\.png"):
        quick(tmp_path / "out.jsonl")


def test_a_worker_that_was_killed_is_told(photos, processor, monkeypatch):
    def die(source, at_least=None):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("modeling_coca.inference.loading.open_image", die)
    loader = ImageLoader(open_images(photos), processor.image_processor, num_workers=1)
    with pytest.raises(OSError, match=r"ended from outside.*use fewer `num_workers`"):
        list(loader)
