"""`coca index` and `coca search`."""

import json

import pytest

from modeling_coca.inference import caption_images
from modeling_coca.inference.journal import Journal
from modeling_coca.retrieval import CocaIndex


def test_a_folder_is_indexed_searched_extended_and_thinned_out(coca, photos, model_folder, tmp_path):
    folder = tmp_path / "photos.index"
    code, out, _ = coca("index", photos / "more", "-o", folder, "--num_workers", 0)
    assert code == 0 and out.startswith(
        f"2 images in {folder}, 2 of them new. exact: compares the query with each of 2"
    )
    code, out, _ = coca("index", photos, "-o", folder, "--num_workers", 0, "--json")
    assert json.loads(out) == {"index": str(folder), "images": 12, "added": 10, "kind": "exact", "failed": []}

    expected = CocaIndex.load(folder).search("a red square", k=3)
    code, out, _ = coca("search", folder, "a red square", "-k", 3)
    assert code == 0 and out.splitlines() == [f"{hit.score:.3f}\t{hit.id}" for hit in expected]
    _, out, _ = coca("search", folder, "--image", expected[0].id, "-k", 1, "--json")
    assert json.loads(out) == {"id": expected[0].id, "score": pytest.approx(1, abs=1e-5), "metadata": {}}
    _, out, _ = coca("search", folder, "a red square", "-k", 2, "--rerank", 12, "--json")
    assert [json.loads(line)["log_prob"] for line in out.splitlines()] == sorted(
        (json.loads(line)["log_prob"] for line in out.splitlines()), reverse=True
    )

    code, out, _ = coca("index", "-o", folder, "--remove", expected[0].id, "--kind", "hnsw")
    assert code == 0 and out.startswith(f"11 images in {folder}, 0 of them new. hnsw, as asked for.")
    _, out, _ = coca("search", folder, "a red square", "-k", 12)
    assert len(out.splitlines()) == 11 and expected[0].id not in out


def test_captions_are_indexed_with_their_texts(coca, photos, model_folder, tmp_path):
    coca("caption", photos, "-o", tmp_path / "captions.jsonl", "--embeddings", "--num_workers", 0)
    code, out, _ = coca("index", tmp_path / "captions.jsonl", "--captions", "-o", tmp_path / "index")
    assert code == 0 and "12 images" in out
    rows = {row["id"]: row["caption"] for row in caption_images(photos, model=model_folder, num_workers=0)}
    _, out, _ = coca("search", tmp_path / "index", "a red square", "-k", 1, "--json")
    hit = json.loads(out)
    assert hit["metadata"]["caption"] == rows[hit["id"]]


def test_work_that_was_done_is_not_lost(coca, photos, tmp_path, monkeypatch):
    """Killed in the middle, it goes on; killed between the embeddings and the index, it makes the index."""
    folder = tmp_path / "index"
    write, calls = Journal.write, []

    def stop(self, shard, rows):
        if len(calls) == 2:
            raise OSError("killed")
        calls.append(len(rows))
        write(self, shard, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", stop)
        assert coca("index", photos, "-o", folder, "--batch_size", 4, "--num_workers", 0)[0] == 1
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", lambda self, shard, rows: calls.append(len(rows)) or write(self, shard, rows))
        patched.setattr(CocaIndex, "save", lambda self, folder: (_ for _ in ()).throw(OSError("killed")))
        assert coca("index", photos, "-o", folder, "--batch_size", 4, "--num_workers", 0)[0] == 1
    assert calls == [4, 4, 4]
    code, out, _ = coca("index", photos, "-o", folder, "--num_workers", 0)
    assert code == 0 and out.startswith(f"12 images in {folder}, 12 of them new")
    assert calls == [4, 4, 4] and not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["index", "-o", "{tmp}/none"], "say which images go into it"),
        (["index", "{bad}", "-o", "{tmp}/none"], "none of the 1 images could be read"),
        (["search", "./nowhere", "a"], "There is no index ./nowhere"),
        (["search", "{tmp}/index"], "Give `text`, `image`, or both"),
        (["search", "{tmp}/index", "--image", "gone.png"], "cannot be loaded"),
        (["index", "-o", "{tmp}/index", "--remove", "gone.png"], "There is no image 'gone.png'"),
    ],
)
def test_errors_take_one_line(args, message, coca, photos, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    coca("index", photos / "more", "-o", tmp_path / "index", "--num_workers", 0)
    code, _, err = coca(*[arg.format(tmp=tmp_path, bad=tmp_path / "bad.png") for arg in args])
    assert code == 1 and message in err


def test_an_index_takes_in_what_a_killed_run_had_finished(coca, photos, tmp_path, monkeypatch):
    """Killed when the embeddings were complete, and before the rest of their making was removed."""
    folder = tmp_path / "photos.index"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_tidy", lambda self: (_ for _ in ()).throw(OSError("killed")))
        assert coca("index", photos, "-o", folder, "--num_workers", 0)[0] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["..new.parquet.coca", ".new.parquet"]
    for _ in range(2):
        code, out, err = coca("index", photos, "-o", folder, "--num_workers", 0)
        assert code == 0 and "12 images" in out, err
    assert not list(folder.glob(".*"))
