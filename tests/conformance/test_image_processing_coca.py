"""transformers' own image processor tests on both backends."""

import unittest

import pytest
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

pytest.importorskip("torchvision")
from modeling_coca import CocaImageProcessor, CocaImageProcessorPil


class CocaImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": CocaImageProcessor, "pil": CocaImageProcessorPil}


class CocaImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = CocaImageProcessingTester
