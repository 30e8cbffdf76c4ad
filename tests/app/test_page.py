"""The page's answers are the library's, its errors are words, its bounds hold, and users do not meet each other."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from types import SimpleNamespace

import gradio_client.exceptions
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from modeling_coca import CocaForConditionalGeneration, CocaModel
from modeling_coca.app import build_page, launch_app, page
from modeling_coca.app.rendering import names_of, search_hits, word_panels
from modeling_coca.inference import ask_images, caption_images, classify_images
from modeling_coca.retrieval import SearchHit
from modeling_coca.visualization import WordMaps, word_maps


@pytest.fixture(scope="module")
def client(served):
    return Client(served.url, verbose=False)


@pytest.fixture(scope="module")
def picture(photos):
    return photos / "00.png"


def opened(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def names_in(html):
    return [unescape(name) for name in re.findall(r'<span title="([^"]*)">', html)]


class Raw:
    """Requests as anybody can write them, without gradio's client."""

    def __init__(self, url):
        self.http = httpx.Client(base_url=f"{url}/gradio_api", timeout=30)

    def upload(self, content, name="a.png"):
        return self.http.post("/upload", files={"files": (name, content)})

    def start(self, verb, *data):
        return self.http.post(f"/call/{verb}", json={"data": data})

    def ask(self, verb, *data):
        """-> "complete" or "error", and the data."""
        answer = self.http.get(f"/call/{verb}/{self.start(verb, *data).json()['event_id']}").text
        found = re.findall(r"event: (complete|error)\ndata: (.*)", answer)
        return found[0][0], json.loads(found[0][1])


@pytest.fixture
def raw(served):
    return Raw(served.url)


def file_of(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


# ----------------------------------------------------------------------------------------------------------- answers


def test_a_caption_with_a_map_for_each_word(client, served, picture):
    caption, below = client.predict(handle_file(picture), api_name="/caption")
    row = caption_images([opened(picture)], **served.loaded)[0]
    assert caption == row["caption"]
    assert [unescape(word) for word in re.findall(r"<figcaption>(.*?)</figcaption>", below)] == caption.split()
    assert below.count("data:image/jpeg;base64,") == len(caption.split())


def test_an_answer_with_its_probability(client, served, picture):
    answer, below = client.predict(handle_file(picture), "what is it?", api_name="/ask")
    row = ask_images([opened(picture)], "what is it?", **served.loaded)[0]
    assert answer == row["answer"] and f"{np.exp(row['log_prob']):.0%}" in below


def test_labels_of_ones_own(client, served, picture):
    found = client.predict(handle_file(picture), "a red square, blue,blue,\ngreen circle,", "{}", api_name="/classify")
    row = classify_images(
        [opened(picture)],
        classes=["a red square", "blue", "green circle"],
        classifier_kwargs={"templates": ["{}"]},
        **served.loaded,
    )[0]
    assert {label["label"]: label["confidence"] for label in found["confidences"]} == {
        label["label"]: pytest.approx(label["score"], abs=1e-6) for label in row["labels"]
    }


def test_search_by_words_by_picture_and_by_both(client, served, photos, picture):
    def expected(**query):
        return [hit.id.removeprefix(f"{photos}/") for hit in served.index.search(k=12, **query)]

    words, seen = "a red square", handle_file(picture)
    html = client.predict(words, None, False, api_name="/search")
    assert names_in(html) == expected(text=words) and html.count("<img") == 12
    assert str(photos) not in html
    assert names_in(client.predict(words, seen, False, api_name="/search")) == expected(text=words)
    by_picture = names_in(client.predict("", seen, False, api_name="/search"))
    assert by_picture == expected(image=opened(picture)) and by_picture[0] == "00.png"
    assert names_in(client.predict(words, seen, True, api_name="/search")) == expected(
        text=words, image=opened(picture)
    )


def test_a_picture_on_its_side_is_turned(client, served, picture, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    opened(picture).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright = client.predict(handle_file(picture), api_name="/caption")
    assert client.predict(handle_file(tmp_path / "turned.png"), api_name="/caption") == upright


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, picture):
    """Files that are no pictures to take, by the words that say so."""
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(picture.read_bytes()[:300])
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    Image.new("RGB", (400, 300)).save(folder / "large.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.png", "This file is no picture that can be read. Use a JPEG, PNG"),
        ("cut.png", "This picture is damaged"),
        ("script.eps", "This file is no picture that can be read"),
        ("large.png", "This picture has 400 × 300 pixels. Make it smaller: 0.1 million pixels in all"),
        ("bomb.png", "This picture has far too many pixels"),
    ],
)
def test_a_file_that_is_no_picture_to_take(client, spoilt, name, words):
    with pytest.raises(gradio_client.exceptions.AppError) as told:
        client.predict(handle_file(spoilt / name), api_name="/caption")
    assert words in str(told.value)
    assert "/" not in str(told.value) and "Traceback" not in str(told.value)


@pytest.mark.parametrize(
    ("verb", "inputs", "words"),
    [
        ("caption", [None], "Choose a picture first"),
        ("ask", [None, "what is it?"], "Choose a picture first"),
        ("ask", ["picture", "  "], "The question is empty"),
        ("ask", ["picture", "what " * 30], "The question is too long for this model"),
        ("ask", ["picture", "?" * 3000], "The question has 3000 characters"),
        ("classify", ["picture", "", "{}"], "Write at least two labels"),
        ("classify", ["picture", "red, red", "{}"], "Write at least two labels"),
        ("classify", ["picture", "red, blue", "a thing"], "Write {} in the sentence"),
        ("classify", ["picture", "red, " + "blue " * 30, "{}"], "The label “blue blue"),
        ("classify", ["picture", ",".join(map(str, range(101))), "{}"], "These are 101 labels"),
        ("search", ["", None, False], "Write what to look for, or choose a picture"),
        ("search", ["red", None, True], "Choose a picture first"),
        ("search", ["red " * 30, None, False], "The search is too long for this model"),
    ],
)
def test_what_is_missing_or_too_much_is_told(client, picture, verb, inputs, words):
    inputs = [handle_file(picture) if value == "picture" else value for value in inputs]
    with pytest.raises(gradio_client.exceptions.AppError) as told:
        client.predict(*inputs, api_name=f"/{verb}")
    assert words in str(told.value) and "Traceback" not in str(told.value)


def test_failures_of_the_server_are_not_told_to_strangers(client, picture, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("/home/me/secret")

    monkeypatch.setattr(page, "word_maps", fail)
    with pytest.raises(gradio_client.exceptions.AppError) as told:
        client.predict(handle_file(picture), api_name="/caption")
    assert "Something went wrong here" in str(told.value) and "secret" not in str(told.value)


# ------------------------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/x.png", "..\\..\\x.png", "%2e%2e%2fx.png", "..", "x" * 500 + ".png", "<b>.png"]
)
def test_a_name_leads_to_no_path_outside(raw, served, picture, name):
    answer = raw.upload(picture.read_bytes(), name)
    if answer.status_code == 200:
        (path,) = answer.json()
        assert served.uploads in type(picture)(path).resolve().parents
        state, (caption, _) = raw.ask("caption", {**file_of(path), "orig_name": name})
        assert state == "complete" and caption
    else:
        assert answer.status_code == 400 and name == ".."
    assert not [found for found in served.uploads.parent.parent.rglob("x.png") if served.uploads not in found.parents]


def test_only_uploads_are_read(raw, served, photos, picture, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download", lambda *args, **_: fetched.append(args)
    )
    for path in (picture, f"{served.uploads}/../{photos.name}/00.png", "/etc/hostname"):
        state, told = raw.ask("caption", file_of(path))
        assert (state, told["error"]) == ("error", None)  # the log says more
    state, told = raw.ask("caption", file_of("http://127.0.0.1:9/a.png"))
    assert state == "error" and "not its address" in str(told) and not fetched
    state, told = raw.ask("caption", {"url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}})
    assert state == "error" and "as a file" in str(told)
    for path in (picture, "/etc/hostname", served.uploads.parent / "photos.index" / "index.json"):
        assert raw.http.get(f"/file={path}").status_code == 403


def test_requests_are_bounded_before_they_are_read(raw):
    assert raw.upload(bytes(200_001)).status_code == 413
    assert raw.start("ask", None, "x" * 300_000).status_code == 413
    assert raw.http.post("/upload", content=iter([b"x"])).status_code == 411  # of unknown length


def test_uploads_are_deleted(model_folder, picture, monkeypatch):
    monkeypatch.setattr(page, "LOOKED_AFTER_EVERY", 1)
    monkeypatch.setattr(page, "KEPT_FOR", 1)
    short = launch_app(model_folder)
    try:
        (path,) = Raw(short.local_url.rstrip("/")).upload(picture.read_bytes()).json()
        stored = type(picture)(path)
        assert stored.is_file()
        for _ in range(40):
            if not stored.exists():
                break
            time.sleep(0.25)
        assert not stored.exists()
    finally:
        short.close(verbose=False)


def test_nobody_else_is_let_in(served):
    assert served.page.share_url is None and not served.tunnels and served.url.startswith("http://127.0.0.1:")
    port = int(served.url.rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(OSError):  # it would answer there if it listened on 0.0.0.0
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
    # no way round the queue
    assert httpx.post(f"{served.url}/gradio_api/run/caption", json={"data": [None]}).status_code == 404


def test_what_comes_from_elsewhere_is_no_markup():
    evil = '<img src=x onerror="alert(1)">'
    maps = WordMaps([evil], np.random.rand(1, 2, 2), Image.new("RGB", (8, 8)), evil)
    hits = [
        (SearchHit(evil, 0.5, {}), evil, None),
        (SearchHit("a", 0.5, {"caption": evil}), "a", Image.new("RGB", (8, 8))),
    ]
    for html in (word_panels(maps), search_hits(hits)):
        assert "<img src=x" not in html and "&lt;img src=x" in html


def test_names_of_images_leave_out_the_folder_they_share():
    assert names_of(["/home/me/p/a.png", "/home/me/p/b/c.png"]) == {
        "/home/me/p/a.png": "a.png",
        "/home/me/p/b/c.png": "b/c.png",
    }
    assert names_of(["p/a.png"]) == {"p/a.png": "a.png"}
    assert names_of(["1", "2"]) == {"1": "1", "2": "2"}
    assert names_of(["/home/a.png", "b.png"]) == {"/home/a.png": "a.png", "b.png": "b.png"}


# ------------------------------------------------------------------------------------------------------- many at once


def test_everybody_gets_the_own_answer(served, tmp_path):
    """16 at once, each with another picture and question."""
    random = np.random.default_rng(1)
    paths = [tmp_path / f"{number}.png" for number in range(16)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    alone = [
        (
            caption_images([opened(path)], **served.loaded)[0]["caption"],
            ask_images([opened(path)], f"what is {number}?", **served.loaded)[0]["answer"],
        )
        for number, path in enumerate(paths)
    ]
    start = threading.Barrier(16)

    def one_user(number):
        user = Raw(served.url)
        (path,) = user.upload(paths[number].read_bytes()).json()
        start.wait(timeout=30)
        caption = user.ask("caption", file_of(path))
        answer = user.ask("ask", file_of(path), f"what is {number}?")
        return caption, answer

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(one_user, range(16)))
    assert len({caption for caption, _ in alone}) > 1
    assert [(caption[1][0], answer[1][0]) for caption, answer in together] == alone
    assert {state for pair in together for state, _ in pair} == {"complete"}


def test_the_queue_is_bounded_and_says_so(model_folder, picture, monkeypatch):
    go_on, running, running_now, most = threading.Event(), threading.Event(), [], []

    def slow(*args, **kwargs):
        running_now.append(1)
        most.append(len(running_now))
        running.set()
        assert go_on.wait(timeout=30)
        running_now.pop()
        return word_maps(*args, **kwargs)

    monkeypatch.setattr(page, "word_maps", slow)
    small = launch_app(model_folder, max_queue=2)
    try:
        user = Raw(small.local_url.rstrip("/"))
        (path,) = user.upload(picture.read_bytes()).json()
        first = user.start("caption", file_of(path))
        assert running.wait(timeout=30)
        waiting = [user.start("caption", file_of(path)) for _ in range(2)]
        refused = [user.start("caption", file_of(path)), user.start("ask", file_of(path), "what?")]
        assert [answer.status_code for answer in refused] == [503, 503]
        assert "Queue is full. Max size is 2" in refused[0].text
        go_on.set()
        for accepted in (first, *waiting):
            answer = user.http.get(f"/call/caption/{accepted.json()['event_id']}").text
            assert "event: complete" in answer
        assert len(most) == 3 and max(most) == 1  # one at a time, whatever the verb
        assert user.ask("caption", file_of(path))[0] == "complete"
    finally:
        go_on.set()
        small.close(verbose=False)


# ------------------------------------------------------------------------------------------------- models and indexes


def verbs_of(built):
    return {function.api_name for function in built.fns.values() if function.api_visibility == "public"}


def test_a_page_offers_what_its_model_can_do(served, model_folder, tmp_path):
    assert verbs_of(served.page) == {"caption", "ask", "classify", "search"}
    assert verbs_of(build_page(**served.loaded)) == {"caption", "ask", "classify"}
    CocaModel.from_pretrained(model_folder).save_pretrained(tmp_path)
    served.loaded["processor"].save_pretrained(tmp_path)
    dual = launch_app(tmp_path)
    try:
        assert verbs_of(dual) == {"classify"}
        assert page._class_of(model_folder) is CocaForConditionalGeneration
    finally:
        dual.close(verbose=False)


def test_the_model_is_in_memory_once(served, monkeypatch):
    built = []
    monkeypatch.setattr(
        page,
        "build_page",
        lambda *args, **kwargs: built.append(args) or SimpleNamespace(queue=lambda **_: None, launch=lambda **_: None),
    )
    launch_app(index=served.uploads.parent / "photos.index")
    ((model, _, index),) = built
    assert isinstance(model, CocaForConditionalGeneration) and index.embedder.model is model


def test_errors_before_anything_is_served(served, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="Say which `model`"):
        launch_app()
    with pytest.raises(FileNotFoundError, match=r"There is no model folder \./none"):
        launch_app("./none")
    CocaForConditionalGeneration(tiny_config(projection_dim=48)).save_pretrained(tmp_path)
    served.loaded["processor"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made by another model"):
        launch_app(tmp_path, served.uploads.parent / "photos.index")


def test_nothing_leaves_this_computer(client, connections, picture):
    client.predict(handle_file(picture), api_name="/caption")
    hosts = {address[0] for address in connections if isinstance(address, tuple)}
    assert hosts and hosts <= {"127.0.0.1", "127.0.0.2", "::1", "localhost"}
