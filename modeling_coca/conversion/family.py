"""A family of checkpoints, and the conversion of one of its members."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_coca import CocaConfig
from ..modeling_coca import CocaForConditionalGeneration, CocaModel
from .sources import RELEASE_AFTER, Weights
from .table import SCALAR, Match, Row, Shapes, differences, match, strip_wrappers, write_out


def _never(name: str, their_config: Mapping, like: torch.Tensor) -> torch.Tensor | None:
    return None


class Family(NamedTuple):
    """All that tells one library's checkpoints from another's.

    Args:
        name: In messages, and of the module that holds its table.
        package: What to install for `--check`.
        title: Which checkpoints these are, in a phrase.
        table: Names.
        owns: Whether a set of names (without wrappers) is of this family.
        infer_config: From shapes to the arguments with which the library builds the model.
        to_config: From those arguments to ours. Refuses by name what ours cannot say.
        ways: The values of `Row.when` that hold for a config.
        fill: The values of a tensor that a fitting file may lack, or `None`: (their name, their config, a tensor of its shape).
        defaults: Of the library's arguments, to explain differences.
        assumed: What `infer_config` could not read from the tensors, in a phrase.
        rename: From a checkpoint's names to those of the table.
        decoder_is_optional: Whether checkpoints without a decoder are known.
    """

    name: str
    package: str
    title: str
    table: list[Row]
    owns: Callable[[set[str]], bool]
    infer_config: Callable[[Shapes], dict]
    to_config: Callable[[dict], CocaConfig]
    ways: Callable[[CocaConfig], set[str]] = lambda config: set()
    fill: Callable[[str, Mapping, torch.Tensor], torch.Tensor | None] = _never
    defaults: Mapping[str, Any] = {}
    assumed: str = "heads of 64 channels"
    rename: Callable[[str], str] = strip_wrappers
    decoder_is_optional: bool = False


class Conversion:
    """One checkpoint matched with the model that its config describes, before any tensor is read.

    Args:
        family: Of the checkpoint.
        their_config: The arguments with which the library builds the model.
        shapes: What the checkpoint holds.

    Raises:
        ValueError: The config cannot be expressed, or the tensors do not fit it (see `match`).
    """

    def __init__(self, family: Family, their_config: dict, shapes: Shapes):
        self.family, self.their_config = family, their_config
        try:
            self.config = family.to_config(their_config)
        except ValueError:
            raise
        except StrictDataclassError as error:  # of a field of ours, to which one of theirs leads
            raise ValueError(
                f"The {family.name} config makes no CoCa: {str(error).splitlines()[-1].strip()}"
            ) from error
        except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise ValueError(
                f"The {family.name} config has a missing or wrong value ({error!r}): correct it."
            ) from error
        # Without a decoder (CONCH's) it is a dual encoder, whose names lack the prefix
        self.has_decoder = not family.decoder_is_optional or any("text_decoder." in name for name in shapes)
        model_class = CocaForConditionalGeneration if self.has_decoder else CocaModel
        self.prefix = "" if self.has_decoder else "model."
        with torch.device("meta"):
            self.model = model_class(self.config)
        self.parameters = {self.prefix + name: tensor for name, tensor in self.model.state_dict().items()}
        entries = write_out(family.table, self.parameters, family.ways(self.config), family.name)
        meta = {entry.theirs: entry for entry in entries}
        self.matches = match(
            entries,
            self.parameters,
            shapes,
            rename=family.rename,
            may_lack=lambda name: family.fill(name, their_config, self._like(meta[name])) is not None,
            title=f"The state dict does not fit the {family.name} config.",
            hints=lambda: self._hints(shapes),
        )

    def _like(self, entry) -> torch.Tensor:
        return entry.transform.to_theirs(*(self.parameters[name] for name in entry.ours))

    def _hints(self, shapes: Shapes) -> list[str]:
        try:
            inferred = self.family.infer_config({self.family.rename(name): shape for name, shape in shapes.items()})
        except (KeyError, ValueError, IndexError):  # tensors that would tell are among the missing ones
            return []
        return differences(self.their_config, inferred, self.family.defaults)

    def tensors(
        self, weights: Mapping[str, torch.Tensor], matches: list[Match] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Our tensors one after the other, as views of the checkpoint's where possible.

        Args:
            weights: The checkpoint.
            matches: Some of `self.matches`, by default all.
        """
        for entry, source in self.matches if matches is None else matches:
            if source is None:
                tensor = self.family.fill(entry.theirs, self.their_config, self._like(entry))
            else:
                tensor = weights[source]
            if entry.transform is SCALAR:  # () or (1,), as the library pleased
                tensor = tensor.reshape(())
            for name, part in zip(entry.ours, entry.transform.to_ours(tensor), strict=True):
                yield name.removeprefix(self.prefix), part

    def state_dict(
        self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Our state dict, each tensor copied once; `dtype=None` keeps the checkpoint's."""
        state_dict, copied = {}, 0
        for name, tensor in self.tensors(weights):
            state_dict[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)
            copied += tensor.nbytes
            if copied > RELEASE_AFTER and isinstance(weights, Weights):
                weights.release()
                copied = 0
        return state_dict

    def load(
        self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
    ) -> CocaForConditionalGeneration | CocaModel:
        """The model in eval mode, which shares no memory with `weights`."""
        self.model.load_state_dict(self.state_dict(weights, dtype), assign=True)
        return self.model.eval()
