"""Stands in for transformers' tests of `generate()`, which its sdist lacks. Ours are in `tests/test_generation_coca.py`."""


class GenerationTesterMixin:
    pass
