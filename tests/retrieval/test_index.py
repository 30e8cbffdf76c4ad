"""CocaIndex: what it finds, keeps, forgets and stores. Neighbours are compared with those found by multiplying it out."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from PIL import Image

from modeling_coca import CocaForConditionalGeneration, CocaModel, CocaProcessor
from modeling_coca.inference import caption_images, read_rows
from modeling_coca.retrieval import CocaIndex, choose_kind


def clustered(number, size, seed=0, clusters=50):
    """Rows around `clusters` centres, which are the same for every seed."""
    centres = np.random.default_rng(0).normal(size=(clusters, size))
    random = np.random.default_rng(seed)
    rows = centres[random.integers(clusters, size=number)] + 0.7 * random.normal(size=(number, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nearest(queries, rows, k):
    return np.argsort(-(queries @ rows.T), axis=1)[:, :k]


def recall(found, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), expected.tolist(), strict=True)])


@pytest.fixture(scope="module")
def index_of_photos(photos, model_folder):
    return CocaIndex.from_images(photos, model=model_folder, num_workers=0, show_progress=False)


@pytest.fixture(scope="module")
def embeddings(photos, model_folder):
    """Of the photos, in order, by the model itself."""
    paths = sorted(str(path) for path in photos.rglob("*.*"))
    pixels = CocaProcessor.from_pretrained(model_folder)(images=paths, return_tensors="pt")
    with torch.no_grad():
        pooled = CocaModel.from_pretrained(model_folder).eval().get_image_features(**pixels).pooler_output
    return paths, F.normalize(pooled, dim=-1).numpy()


# ------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize(("kind", "least"), [("exact", 1.0), ("hnsw", 0.99), ("ivfpq", 0.9)])
def test_neighbours_are_the_true_ones_before_and_after_adding_and_removing(kind, least):
    rows, queries = clustered(12_000, 16), clustered(64, 16, seed=1)
    index = CocaIndex(kind=kind)
    ids = [f"image {number}" for number in range(12_000)]
    index.add(rows[:11_000], ids[:11_000])
    assert recall(index.search_embeddings(queries, 10)[1], nearest(queries, rows[:11_000], 10)) >= least
    structure = index._faiss.faiss_index
    index.add(3 * rows[11_000:], ids[11_000:])  # normalised by the index
    scores, found = index.search_embeddings(queries, 10)
    assert recall(found, nearest(queries, rows, 10)) >= least
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ rows.T, found, 1), atol=1e-5)
    assert (np.diff(scores) <= 0).all()

    best = np.unique(found[:, 0])
    index.remove([ids[row] for row in best])
    assert len(index) == 12_000 - len(best) and ids[best[0]] not in index
    left = np.setdiff1d(np.arange(12_000), best)
    _, found = index.search_embeddings(queries, 10)
    assert not set(best.tolist()) & set(found.flatten().tolist())
    assert recall(found, left[nearest(queries, rows[left], 10)]) >= least
    assert index._faiss.faiss_index is structure  # nothing was built anew

    index.rebuild()
    assert len(index.dataset) == len(left) and index.ids == [ids[row] for row in left]
    assert recall(left[index.search_embeddings(queries, 10)[1]], left[nearest(queries, rows[left], 10)]) >= least
    index.add(rows[best], [ids[row] for row in best])  # may come back


def test_kinds_are_chosen_by_size_and_explained():
    sizes = (0, 100_000, 100_001, 2_000_000, 2_000_001)
    assert [choose_kind(number)[0] for number in sizes] == ["exact", "exact", "hnsw", "hnsw", "ivfpq"]
    index = CocaIndex()
    assert index.explain() == "empty" and repr(index) == "CocaIndex(0 images, empty)"
    index.add(np.eye(4), list("abcd"))
    index.rebuild()
    assert index.explain() == f"exact: {choose_kind(4)[1]}" and "nothing is missed" in choose_kind(4)[1]
    index.rebuild("hnsw")
    assert index.explain().startswith("hnsw, as asked for. exact would suit 4 images")
    scores, rows = index.search_embeddings(np.eye(4)[:1], 6)
    assert rows[0, 0] == 0 and sorted(rows[0, :4]) == [0, 1, 2, 3] and rows[0, 4:].tolist() == [-1, -1]
    assert scores[0, 4:].tolist() == [-np.inf, -np.inf]


def test_errors_name_the_field():
    index = CocaIndex()
    index.add(np.eye(4), list("abcd"), {"note": [1, 2, 3, 4]})
    for call, message in [
        (lambda: index.add(np.eye(4)[:1], ["a"]), "of the same name already, such as 'a'"),
        (lambda: index.add(np.eye(4)[:2], ["x", "x"]), "such as 'x'"),
        (lambda: index.add(np.eye(5), list("vwxyz")), "have 5 numbers, those in the index 4"),
        (lambda: index.add(np.zeros((1, 4)), ["z"]), "rows of zeros"),
        (lambda: index.add(np.full((1, 4), np.nan), ["z"]), "not finite"),
        (lambda: index.add(np.eye(4), ["z"]), "need 1 rows"),
        (lambda: index.add(np.eye(4)[:1], ["z"], {"note": [1, 2]}), "must have 1 values"),
        (lambda: index.remove("nobody"), "There is no image 'nobody'"),
        (lambda: index.search(), "Give `text`, `image`, or both"),
        (lambda: index.search("a", k=5, rerank=3), "at least `k`"),
        (lambda: index.search("a"), "has no model"),
        (lambda: index.search_embeddings(np.eye(4), 0), "`k` must be at least 1"),
        (lambda: index.rebuild("ivfpq"), "at least 9984 images"),
        (lambda: index.rebuild("tree"), "`kind` must be one of exact, hnsw, ivfpq"),
        (lambda: CocaIndex(kind="tree"), "`kind` must be one of"),
        (lambda: CocaIndex().save("nowhere"), "is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert len(index) == 4


# ----------------------------------------------------------------------------------------------------------- images


def test_images_are_found_by_text_by_image_and_by_both(index_of_photos, embeddings, model_folder):
    index, (paths, image_embeds) = index_of_photos, embeddings
    assert index.ids == paths
    np.testing.assert_allclose(np.stack(index.dataset["embedding"]), image_embeds, atol=1e-5)
    processor = CocaProcessor.from_pretrained(model_folder)
    inputs = processor.tokenizer(["a red square"], return_tensors="pt")
    with torch.no_grad():
        text = CocaModel.from_pretrained(model_folder).eval().get_text_features(**inputs).pooler_output
    text = F.normalize(text, dim=-1).numpy()[0]

    def expected(query, k):
        scores = image_embeds @ (query / np.linalg.norm(query))
        return [(paths[row], pytest.approx(scores[row], abs=1e-5)) for row in np.argsort(-scores)[:k]]

    def found(*args, **kwargs):
        return [(hit.id, hit.score) for hit in index.search(*args, **kwargs)]

    assert found("a red square", k=5) == expected(text, 5)
    assert found(image=paths[7], k=3) == expected(image_embeds[7], 3) and found(image=paths[7], k=1)[0][0] == paths[7]
    assert found(image=Image.open(paths[7]).convert("RGB"), k=3) == expected(image_embeds[7], 3)
    both = found("a red square", image=paths[7], text_weight=0.75, k=12)
    assert both == expected(0.75 * text + 0.25 * image_embeds[7], 12)
    assert len(index.search("a red square", k=50)) == 12


def test_re_ranking_is_by_caption_likelihood(index_of_photos, embeddings, model_folder, tmp_path):
    paths, _ = embeddings
    processor = CocaProcessor.from_pretrained(model_folder)
    model = CocaForConditionalGeneration.from_pretrained(model_folder).eval()
    ids = processor.tokenizer(["a red square"], return_tensors="pt")["input_ids"]
    pixels = processor(images=paths, return_tensors="pt")["pixel_values"]
    log_probs = dict(zip(paths, model.score_captions(ids, pixels)[:, 0].tolist(), strict=True))
    nearest = [hit.id for hit in index_of_photos.search("a red square", k=6)]
    hits = index_of_photos.search("a red square", k=3, rerank=6)
    assert [hit.id for hit in hits] == sorted(nearest, key=lambda name: -log_probs[name])[:3]
    assert [hit.log_prob for hit in hits] == pytest.approx([log_probs[hit.id] for hit in hits], abs=1e-4)
    copy = tmp_path / "copy.png"
    shutil.copy(paths[0], copy)
    index = CocaIndex.from_images([copy, paths[3]], model=model_folder, num_workers=0)
    copy.unlink()
    assert [hit.log_prob is None for hit in index.search("a red square", k=2, rerank=2)] == [False, True]
    index.remove(paths[3])
    with pytest.raises(ValueError, match=r"by their ids, and .*copy\.png cannot be read"):
        index.search("a red square", k=1, rerank=2)


def test_only_new_images_are_embedded(photos, model_folder, index_of_photos, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    index = CocaIndex.from_images(photos / "more", model=model_folder, num_workers=0)
    seen = []
    handle = index.embedder.model.vision_model.register_forward_hook(lambda m, a, out: seen.append(len(out[0])))
    failed = index.add_images([photos, tmp_path / "bad.png"], num_workers=0)
    handle.remove()
    assert failed == [(str(tmp_path / "bad.png"), "no image format that Pillow knows")]
    assert sum(seen) == 10 and len(index) == 12
    text = "a green circle"
    assert [hit.id for hit in index.search(text)] == [hit.id for hit in index_of_photos.search(text)]


def test_captions_with_embeddings_become_an_index(photos, model_folder, index_of_photos, tmp_path):
    options = {"model": model_folder, "num_workers": 0, "max_new_tokens": 4}
    caption_images(photos, tmp_path / "captions.parquet", embeddings=True, **options)
    index = CocaIndex(model_folder)
    assert index.add_rows(read_rows(tmp_path / "captions.parquet")) == 12
    hits = index.search("what is it?", k=4)
    assert [hit.id for hit in hits] == [hit.id for hit in index_of_photos.search("what is it?", k=4)]
    captions = {row["id"]: row["caption"] for row in read_rows(tmp_path / "captions.parquet")}
    assert [hit.metadata["caption"] for hit in hits] == [captions[hit.id] for hit in hits]
    with pytest.raises(ValueError, match="has no `embedding`"):
        CocaIndex().add_rows(caption_images(photos, **options))


# ---------------------------------------------------------------------------------------------------------- storage


def test_saved_and_loaded_it_is_the_same(tmp_path, model_folder):
    rows = clustered(300, 24)
    index = CocaIndex(model_folder, kind="hnsw")
    index.add(rows[:200], map(str, range(200)), {"caption": [f"c{number}" for number in range(200)]})
    index.add(rows[200:], map(str, range(200, 300)), {"year": list(range(100))})
    index.remove(["3", "250"])
    index.save(tmp_path / "index")
    loaded = CocaIndex.load(tmp_path / "index")
    assert (loaded.model, loaded.kind, len(loaded), "3" in loaded) == (str(model_folder), "hnsw", 298, False)
    for one, other in zip(index.search_embeddings(rows[:9], 5), loaded.search_embeddings(rows[:9], 5), strict=True):
        np.testing.assert_array_equal(one, other)
    metadata = {hit.id: hit.metadata for hit in loaded.search("a red square", k=298)}
    assert metadata["7"] == {"caption": "c7", "year": None} and metadata["299"] == {"caption": None, "year": 99}
    loaded.add(rows[3:4], ["3"])
    loaded.save(tmp_path / "index")  # over the files that it is mapped from
    again = CocaIndex.load(tmp_path / "index")
    assert again.dataset[int(again.search_embeddings(rows[3:4], 1)[1][0, 0])]["id"] == "3"
    assert len(list((tmp_path / "index").glob("data-*"))) == 1
    wrong = CocaIndex(model_folder)
    wrong.add(np.eye(4), list("abcd"))
    with pytest.raises(ValueError, match="have 24 numbers, those in the index 4"):
        wrong.search("a")


def test_a_save_that_fails_leaves_the_old_index(tmp_path, monkeypatch):
    index = CocaIndex()
    index.add(np.eye(4), list("abcd"))
    index.save(tmp_path / "index")
    index.add(np.eye(4)[:1], ["e"])

    def fail(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        with pytest.raises(OSError, match=r"The disk is full: .*index could not be written"):
            index.save(tmp_path / "index")
    assert len(CocaIndex.load(tmp_path / "index")) == 4
    assert len(list((tmp_path / "index").iterdir())) == 2
    # Killed in its first save
    shutil.copytree(next((tmp_path / "index").glob("data-*")), tmp_path / "first" / "data-0123456789ab")
    index.save(tmp_path / "first")
    assert len(CocaIndex.load(tmp_path / "first")) == 5 and len(list((tmp_path / "first").iterdir())) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="holds other things"):
        index.save(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"no index\.json"):
        CocaIndex.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"There is no index \./nowhere"):
        CocaIndex.load("./nowhere")


def test_on_the_hub_it_is_a_data_set_and_an_index(tmp_path, model_folder, monkeypatch):
    """The Hub is a folder here: what is sent, and that it opens, is tested; not the sending."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Url", (), {"repo_id": f"me/{name}"}))
    sent = []

    def upload(self, *, repo_id, folder_path, **kwargs):
        sent.append((repo_id, kwargs["repo_type"]))
        shutil.copytree(folder_path, tmp_path / "hub", dirs_exist_ok=True)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(tmp_path / "hub"))
    rows = clustered(50, 24)
    index = CocaIndex(str(model_folder))
    index.add(rows, map(str, range(50)), {"caption": [f"c{number}" for number in range(50)]})
    index.remove("0")
    index.push_to_hub("pets")
    assert sent == [("me/pets", "dataset")]  # one commit
    files = sorted(str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*.*"))
    assert files == ["README.md", "data/train-00000-of-00001.parquet", "index/index.faiss", "index/index.json"]
    assert 'CocaIndex.load("me/pets")' in (tmp_path / "hub" / "README.md").read_text()
    plain = datasets.load_dataset(str(tmp_path / "hub"), split="train")
    assert len(plain) == 49 and plain[0]["caption"] == "c1"
    loaded = CocaIndex.load("me/pets")
    assert (len(loaded), loaded.kind, loaded.model) == (49, "exact", str(model_folder))
    assert loaded.dataset[int(loaded.search_embeddings(rows[7:8], 1)[1][0, 0])]["id"] == "7"
    assert json.loads((tmp_path / "hub" / "index" / "index.json").read_text())["chosen_kind"] is None
