"""Tables of names: what every family of checkpoints has in common.

A family writes down, one `Row` a line, which of its tensors becomes which of ours. The same rows serve both directions.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count, groupby, product
from typing import Any, NamedTuple

import torch

Shapes = Mapping[str, tuple[int, ...]]


class Transform(NamedTuple):
    """How one tensor of another library becomes one or more of ours, and back."""

    to_ours: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    to_theirs: Callable[..., torch.Tensor]


COPY = Transform(lambda x: (x,), lambda x: x)
TRANSPOSE = Transform(lambda x: (x.t(),), lambda x: x.t())  # x @ P there, nn.Linear here
SPLIT = Transform(lambda x: x.chunk(3), lambda *qkv: torch.cat(qkv))  # rows of q, k and v packed in one tensor
SCALAR = Transform(lambda x: (x.reshape(1),), lambda x: x.reshape(()))  # FSDP2 refuses parameters without a dimension
LEADING_1 = Transform(lambda x: (x[0],), lambda x: x[None])  # a batch axis of length 1 in front
LEADING_1_1 = Transform(lambda x: (x[0, 0],), lambda x: x[None, None])


class Row(NamedTuple):
    """A line of a table.

    `{i}` counts layers, `{leaf}` is weight or bias, `{qkv}` is q, k or v (in `ours` alone: all three). A row is used if
    the model has the parameter on the right, so optional modules need nothing more. `when` chooses between two ways in
    which a library stores the same thing.
    """

    theirs: str
    ours: str
    transform: Transform = COPY
    when: str | None = None


class Entry(NamedTuple):
    """A row with its placeholders filled in: one tensor there, one or three here."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform


def write_out(table: Iterable[Row], names: Iterable[str], ways: Iterable[str] = (), library: str = "") -> list[Entry]:
    """`table` written out for a model.

    Args:
        table: Of the other library.
        names: Of the model's tensors.
        ways: The values of `Row.when` that hold.
        library: Named in errors.

    Returns:
        One entry for each tensor of the other library, in the order of the table.

    Raises:
        ValueError: A tensor of the model has no row.
    """
    names, ways = set(names), set(ways)
    entries, mapped = [], set()
    for row in table:
        if row.when is not None and row.when not in ways:
            continue
        leaves = ("weight", "bias") if "{leaf}" in row.ours else ("",)
        letters = ("q", "k", "v") if "{qkv}" in row.theirs else ("",)
        layers = count() if "{i}" in row.ours else (0,)
        for i in layers:
            found = False
            for leaf, letter in product(leaves, letters):
                parts = [letter] if letter or "{qkv}" not in row.ours else ["q", "k", "v"]
                ours = tuple(row.ours.format(i=i, leaf=leaf, qkv=part) for part in parts)
                if names.issuperset(ours):
                    found = True
                    mapped.update(ours)
                    entries.append(Entry(row.theirs.format(i=i, leaf=leaf, qkv=letter), ours, row.transform))
            if not found:
                break
    if mapped != names:
        raise ValueError(f"{library}'s CoCa has no place for these tensors: {sorted(names - mapped)}.")
    return entries


def strip_wrappers(name: str) -> str:
    """Names as they were before DistributedDataParallel, torch.compile and a training module that holds the model."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


# The last two: Lightning and the like, and torchmultimodal's `CoCaForPretraining`, whose loss holds the temperature
_WRAPPERS = ("module.", "_orig_mod.", "model.", "contrastive_loss.")


class Match(NamedTuple):
    """An entry with the name that the checkpoint has for it, or `None` where a fitting checkpoint may lack it."""

    entry: Entry
    source: str | None


def match(
    entries: Iterable[Entry],
    parameters: Mapping[str, torch.Tensor],
    shapes: Shapes,
    may_lack: Callable[[str], bool] = lambda name: False,
    rename: Callable[[str], str] = strip_wrappers,
    title: str = "The checkpoint does not fit its config.",
    hints: Callable[[], list[str]] = list,
) -> list[Match]:
    """Checks a whole checkpoint before a tensor of it is read.

    Args:
        entries: Of the model that the config describes.
        parameters: Of that model, which may be on the meta device.
        shapes: What the checkpoint holds.
        may_lack: Whether a checkpoint without this tensor still fits.
        rename: From the checkpoint's names to the table's.
        title: First line of the error.
        hints: Asked for the error: which values of the config would fit.

    Raises:
        ValueError: Tensors are missing, unexpected, of another shape or there twice: all of them are listed, by the
            names that the checkpoint has for them.
    """
    sources, twice = {}, []
    for name in shapes:
        if (stripped := rename(name)) in sources:
            twice.append(name)
        sources[stripped] = name
    matches, missing, misshaped = [], [], []
    for entry in entries:
        source = sources.pop(entry.theirs, None)
        if source is None:
            if not may_lack(entry.theirs):
                missing.append(entry.theirs)
            matches.append(Match(entry, None))
            continue
        matches.append(Match(entry, source))
        wanted = tuple(entry.transform.to_theirs(*(parameters[name] for name in entry.ours)).shape)
        given = tuple(shapes[source])
        if entry.transform is SCALAR and given in ((), (1,)):
            continue
        if given != wanted:
            misshaped.append(f"{source} is {given}, the config asks for {wanted}")
    groups = {
        "missing": collapse(missing),
        "unexpected": collapse(sources.values()),
        "of another shape": collapse(misshaped),
        "twice": collapse(twice),
    }
    problems = [
        f"{sum(number for _, number in lines)} {what}:\n"
        + "\n".join(f"  {line}" + (f" ({number})" if number > 1 else "") for line, number in lines)
        for what, lines in groups.items()
        if lines
    ]
    if problems:
        advice = hints()
        if advice:
            problems.append("What the tensors say:\n" + "\n".join(f"  {line}" for line in advice))
        raise ValueError("\n".join([title, *problems]))
    return matches


def collapse(lines: Iterable[str]) -> list[tuple[str, int]]:
    """Lines that differ only in the number of a layer, as one: `["a.0.b", "a.1.b"]` -> `[("a.{0-1}.b", 2)]`."""
    families: dict[tuple[str, str], list[int | None]] = {}
    for line in lines:
        found = re.search(r"(?<=\.)\d+(?=\.)", line)
        key = (line, "") if found is None else (line[: found.start()], line[found.end() :])
        families.setdefault(key, []).append(None if found is None else int(found[0]))
    return [(_join(before, numbers, after), len(numbers)) for (before, after), numbers in families.items()]


def _join(before: str, numbers: list[int | None], after: str) -> str:
    if numbers == [None]:
        return before
    if len(numbers) == 1:
        return f"{before}{numbers[0]}{after}"
    runs = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"{before}{{{','.join(runs)}}}{after}"


def differences(given: Mapping, inferred: Mapping, defaults: Mapping, section: str = "") -> list[str]:
    """Where a config says something else than the tensors do, a line for each value.

    Args:
        given: The config as it was given.
        inferred: The config that the tensors ask for; only what they can tell is compared.
        defaults: What the library takes where `given` says nothing, nested likewise.
        section: Put before the keys.
    """
    lines = []
    for key, value in inferred.items():
        name = f"{section}.{key}" if section else key
        if isinstance(value, Mapping):
            lines += differences(given.get(key) or {}, value, defaults.get(key, {}), name)
            continue
        said = given.get(key, defaults.get(key))
        if key == "ls_init_value":  # the tensors tell only whether there is a LayerScale
            if (said is None) != (value is None):
                lines.append(f"`{name}` should be {'a number' if said is None else None}, the config means {said!r}")
        elif key not in _ASSUMED and said is not None and not _equal(said, value):
            lines.append(f"`{name}` should be {value!r}, the config {'says' if key in given else 'means'} {said!r}")
    return lines


# Of which the tensors tell nothing
_ASSUMED = ("heads", "num_heads", "attn_pooler_heads", "vision_n_head", "text_n_head", "fusion_n_head", "pooler_n_head")


def _equal(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b


def layers_of(shapes: Shapes, prefix: str) -> int:
    """How many layers `prefix.0`, `prefix.1`, ... the checkpoint has."""
    numbers = {name[len(prefix) + 1 :].split(".", 1)[0] for name in shapes if name.startswith(f"{prefix}.")}
    return len({number for number in numbers if number.isdigit()})


def heads_of(width: int, what: str, head_width: int = 64) -> int:
    """Attention heads leave no trace in the tensors. All public CoCa towers have heads of 64 channels.

    Raises:
        ValueError: `width` is no multiple of that.
    """
    if width % head_width:
        raise ValueError(
            f"The number of attention heads of {what} (width {width}) cannot be read from the tensors: give the config "
            "(`--config`), as the library that trained the checkpoint takes it."
        )
    return width // head_width


def square_grid(tokens: int, what: str) -> int:
    """Side of a square grid of patches.

    Raises:
        ValueError: There is none.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(
            f"{what} has {tokens} patches, which is no square: give the config (`--config`), which tells height and width."
        )
    return side
