"""transformers' own tests of in-tree models, processors and tokenizers, run on CoCa's classes."""

import os
import sys
from pathlib import Path

# Read where transformers' tests are imported: without an accelerator they look for one otherwise
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")

sys.path.append(str(Path(__file__).parent))  # also for the processes that the distributed tests start

import upstream  # noqa: F401  (finds `transformers_tests`)

collect_ignore = ["missing"]


def pytest_configure(config):
    for name in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "is_fsdp_test",
        "is_pipeline_test",
        "is_tensor_parallel_test",
        "is_training_test",
        "order",
        "torch_compile_test",
    ):
        config.addinivalue_line("markers", f"{name}: one of transformers' own")
