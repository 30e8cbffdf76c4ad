"""Emoji drawn by three artists, with their CLDR names as captions, as a `datasets.DatasetDict`.

Pictures and names come from four npm packages, fetched with `npm pack` from the registry that npm is configured for:

| style   | package                         | art licence                                             |
|---------|---------------------------------|---------------------------------------------------------|
| noto    | emoji-datasource-google 16.0.0  | Apache-2.0, Google                                      |
| twemoji | emoji-datasource-twitter 16.0.0 | CC-BY 4.0: "Twemoji © X Corp and contributors"          |
| fluent  | @lobehub/fluent-emoji-3d 1.1.0  | MIT, Microsoft                                          |
| (names) | emojibase-data 17.0.0           | MIT; the names are Unicode CLDR's                       |

The four splits are functions of hashes, so they come out the same everywhere:

- `test_style`: of some concepts one artist's drawing is held out: the caption is known, the drawing is new.
- `test_comp`: of some people one skin tone is held out in every style: each word is known, the combination is new.
- `validation`: 4 % of the remaining drawings; `train`: the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from npm_packages import archive_name, npm_pack, read_archive
from PIL import Image
from tqdm.auto import tqdm

IMAGE_SIZE = 64  # pixels: what noto and twemoji come in
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey")

# What to fetch: (npm package, version, MB to download, pattern of the files that are read).
CLDR_PACKAGE = ("emojibase-data", "17.0.0", 7, r"en/(?:data|messages)\.json")
STYLE_PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0", 74, r"img/google/64/[0-9a-f-]+\.png"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", 62, r"img/twitter/64/[0-9a-f-]+\.png"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", 16, r"assets/[0-9a-f-]+\.webp"),
}

FEATURES = Features(
    {
        "image": ImageFeature(),
        "caption": Value("string"),
        "label": Value("string"),
        "tags": List(Value("string")),
        "group": Value("string"),
        "subgroup": Value("string"),
        "tones": List(Value("string")),
        "gender": Value("string"),
        "style": Value("string"),
        "hexcode": Value("string"),
        "base": Value("string"),
        "qa": List({"question": Value("string"), "answer": Value("string")}),
    }
)

# Territories that fly the flag of a state, pixel by pixel: such a drawing is named after the state.
TERRITORIES = {
    *("Ceuta & Melilla", "Clipperton Island", "St. Martin", "Bouvet Island", "Svalbard & Jan Mayen"),
    *("U.S. Outlying Islands", "Heard & McDonald Islands", "Diego Garcia"),
}
# emoji-datasource-google 16.0.0 shows the flag of Saudi Arabia here.
WRONG_DRAWINGS = {("noto", "flag: Sark")}


def load_emoji(cache_dir: str | os.PathLike[str], keep_downloads: bool = False) -> DatasetDict:
    """Loads the emoji, from `cache_dir` if they are there, else from the npm registry (about 160 MB).

    Args:
        cache_dir: Folder for the finished dataset (about 40 MB) and, until it is finished, the packages.
        keep_downloads: Keep the downloaded packages in `cache_dir/npm`.

    Returns:
        Splits `train` (9036 rows), `validation` (443), `test_style` (351) and `test_comp` (532) with the columns of
        `FEATURES`; images are RGB, 64x64, on white.
    """
    cache_dir = Path(cache_dir)
    target = cache_dir / "emoji"
    if target.is_dir():
        return DatasetDict.load_from_disk(str(target))
    packages = download_packages(cache_dir / "npm")
    dataset = build_dataset(packages)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        dataset.save_to_disk(f"{scratch}/emoji")
        os.replace(f"{scratch}/emoji", target)
    if not keep_downloads:
        shutil.rmtree(cache_dir / "npm", ignore_errors=True)
    return DatasetDict.load_from_disk(str(target))


def download_packages(folder: Path) -> dict[str, Path]:
    """Fetches the packages that `folder` lacks. Returns their archives by style, and the CLDR data as `"cldr"`."""
    wanted = {"cldr": CLDR_PACKAGE, **STYLE_PACKAGES}
    archives = {}
    with tqdm(total=sum(package[2] for package in wanted.values()), unit="MB", desc="download") as bar:
        for key, (name, version, megabytes, _) in wanted.items():
            archives[key] = folder / archive_name(name, version)
            if not archives[key].is_file():
                bar.set_postfix_str(name)
                npm_pack(f"{name}@{version}", archives[key])
            bar.update(megabytes)
        bar.set_postfix_str("")
    return archives


# Names, captions, questions


def normalize_hexcode(name: str) -> str:
    """`"1f468-200d-2764-fe0f"` -> `"1F468-200D-2764"`: artists disagree on the variation selector."""
    return name.upper().replace("-FE0F", "").replace("_", "-")


def load_cldr(data: list[dict[str, Any]], messages: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Flattens emojibase's data: one entry per emoji and skin tone, by normalized hexcode."""
    groups = [group["message"] for group in sorted(messages["groups"], key=lambda group: group["order"])]
    subgroups = [group["message"] for group in sorted(messages["subgroups"], key=lambda group: group["order"])]
    entries = {}
    for emoji in data:
        if emoji.get("group") is None:  # the letters that flags are spelt with
            continue
        for variant in [emoji, *emoji.get("skins", [])]:
            tones = variant.get("tone") or []
            hexcode = normalize_hexcode(variant["hexcode"])
            entries[hexcode] = {
                "hexcode": hexcode,
                "label": variant["label"],
                "tags": emoji.get("tags", []),
                "group": groups[emoji["group"]],
                "subgroup": subgroups[emoji["subgroup"]],
                "tones": [TONES[tone - 1] for tone in ([tones] if isinstance(tones, int) else tones)],
                "gender": {0: "woman", 1: "man"}.get(emoji.get("gender")),
                "base": normalize_hexcode(emoji["hexcode"]),
                "base_label": emoji["label"],
            }
    return entries


def caption_of(label: str) -> str:
    """Turns a CLDR short name into a phrase: `"firefighter: dark skin tone"` -> `"firefighter with dark skin tone"`."""
    if label.startswith("flag: "):
        return "the flag of " + label.removeprefix("flag: ").lower()
    text = label.replace("“", "").replace("”", "").replace("’", "'").lower()
    if text.startswith("keycap: "):
        return "the keycap " + text.removeprefix("keycap: ")
    head, colon, rest = text.partition(": ")
    if not colon:
        return text
    *parts, last = rest.split(", ")
    return f"{head} with {', '.join(parts)} and {last}" if parts else f"{head} with {last}"


def questions_of(entry: dict[str, Any], style: str) -> list[dict[str, str]]:
    """Questions whose answers follow from the CLDR data of `entry`."""
    label, base_label, subgroup = entry["label"], entry["base_label"].lower(), entry["subgroup"]
    pairs = [("what kind of thing is this?", subgroup), ("which category is this?", entry["group"])]
    if len(entry["tones"]) == 1:
        pairs.append(("what is the skin tone?", entry["tones"][0]))
    people = ("people", "gestures", "roles & careers", "fantasy", "activities", "athletics", "resting")
    if entry["gender"] and subgroup in people:
        pairs.append(("is this a man or a woman?", entry["gender"]))
    if label.startswith("flag: "):
        pairs.append(("which flag is this?", label.removeprefix("flag: ").lower()))
    if subgroup in ("hearts", "shapes & colors", "books & paper", "fruit", "flowers"):
        colors = [c for c in COLORS if re.search(rf"^{c}\b|\b{c} (heart|circle|square)", base_label)]
        if len(colors) == 1:
            pairs.append(("what color is it?", colors[0]))
    if subgroup == "time" and re.search(r"o’clock|-thirty", label):
        pairs.append(("what time does the clock show?", label.replace("’", "'").lower()))
    pairs.append(("in which style is this drawn?", style))
    return [{"question": question, "answer": answer} for question, answer in pairs]


# Pictures and splits


def flatten(image: Image.Image, size: int = IMAGE_SIZE) -> Image.Image:
    """Centres a picture on a white square and resizes it to `size` x `size`, RGB."""
    image = image.convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    canvas = canvas.convert("RGB")
    return canvas if side == size else canvas.resize((size, size), Image.Resampling.LANCZOS)


def uniform(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    return int(hashlib.sha256(f"{salt}|{key}".encode()).hexdigest()[:12], 16) / 16**12


def choose_split(entry: dict[str, Any], style: str, base_tones: set[str], styles: list[str]) -> str:
    """The split of one drawing.

    Args:
        entry: CLDR entry of the drawing.
        style: Artist of the drawing.
        base_tones: The skin tones that `entry["base"]` is drawn in, by any artist.
        styles: The artists that drew `entry["hexcode"]`.
    """
    hexcode, base, tones = entry["hexcode"], entry["base"], entry["tones"]
    if len(tones) == 1 and len(base_tones) == len(TONES) and uniform(base, "comp") < 0.6:
        if tones[0] == TONES[int(uniform(base, "tone") * len(TONES))]:
            return "test_comp"
    elif not tones and len(styles) >= 2 and uniform(hexcode, "style") < 0.18:
        if style == sorted(styles)[int(uniform(hexcode, "which") * len(styles))]:
            return "test_style"
    return "validation" if uniform(hexcode + style, "val") < 0.04 else "train"


def read_drawings(
    cldr: dict[str, dict[str, Any]], style: str, files: dict[str, bytes]
) -> list[tuple[dict[str, Any], Image.Image]]:
    """Decodes one artist's files into (CLDR entry, picture), without unnamed, repeated and two-tone drawings."""
    named = [(cldr.get(normalize_hexcode(Path(name).stem)), name) for name in files]
    named = [(entry, name) for entry, name in named if entry is not None]
    # territories last, so that of equal flags the state's is kept
    named.sort(key=lambda pair: (pair[0]["label"].removeprefix("flag: ") in TERRITORIES, pair[1]))
    drawings, seen = [], set()
    for entry, name in tqdm(named, desc=f"draw {style}", unit="img", leave=False):
        if entry["group"] == "components" or len(entry["tones"]) > 1 or (style, entry["label"]) in WRONG_DRAWINGS:
            continue
        image = flatten(Image.open(io.BytesIO(files[name])))
        if image.tobytes() not in seen:
            seen.add(image.tobytes())
            drawings.append((entry, image))
    return drawings


def build_dataset(archives: dict[str, Path]) -> DatasetDict:
    """Builds the splits from the archives of `download_packages`."""
    texts = read_archive(archives["cldr"], CLDR_PACKAGE[3])
    cldr = load_cldr(json.loads(texts["en/data.json"]), json.loads(texts["en/messages.json"]))
    drawings = []
    for style, package in STYLE_PACKAGES.items():
        files = read_archive(archives[style], package[3])
        drawings += [(style, entry, image) for entry, image in read_drawings(cldr, style, files)]

    styles: dict[str, list[str]] = {}
    tones: dict[str, set[str]] = {}
    for style, entry, _ in drawings:
        styles.setdefault(entry["hexcode"], []).append(style)
        tones.setdefault(entry["base"], set()).update(entry["tones"])

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test_style": [], "test_comp": []}
    for style, entry, image in drawings:
        row = {key: entry[key] for key in FEATURES if key in entry}
        row.update(image=_png(image), caption=caption_of(entry["label"]), style=style, qa=questions_of(entry, style))
        rows[choose_split(entry, style, tones[entry["base"]], styles[entry["hexcode"]])].append(row)
    return DatasetDict(
        {
            split: Dataset.from_dict({key: [row[key] for row in items] for key in FEATURES}, features=FEATURES)
            for split, items in rows.items()
        }
    )


def _png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
