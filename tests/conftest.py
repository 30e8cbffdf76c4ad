"""Shared by all tests: no network, few threads, equal seeds, one tiny configuration."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import torch

from modeling_coca import CocaConfig

torch.set_num_threads(1)  # with tiny tensors, several threads only wait for each other

TINY_CONFIG = Path(__file__).parents[1] / "hub_configs" / "coca-tiny" / "config.json"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., CocaConfig]:
    """`tiny_config(pooler_type="shared", text_config={"vocab_size": 99})`: a new config, with these fields changed."""
    fields = json.loads(TINY_CONFIG.read_text())

    def build(**changes) -> CocaConfig:
        parts = {
            name: {**fields[name], **changes.pop(name)} for name in ("vision_config", "text_config") if name in changes
        }
        return CocaConfig(**{**fields, **parts, **changes})

    return build
