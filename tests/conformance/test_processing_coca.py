"""transformers' own processor tests."""

import unittest

import pytest
from transformers_tests.test_processing_common import ProcessorTesterMixin

from modeling_coca import CocaImageProcessor, CocaProcessor, CocaTokenizer
from modeling_coca.processing_coca import CHAT_TEMPLATE

pytest.importorskip("torchvision")

CORPUS = ["lower newer", "upper older longer string", "what does this image show?"] * 10


class CocaProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CocaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return CocaTokenizer(model_max_length=512).train_new_from_iterator(CORPUS, vocab_size=600)

    @classmethod
    def _setup_image_processor(cls):
        return CocaImageProcessor(size=18)

    def prepare_videos_inputs(self, *args, **kwargs):
        return None  # they stand for the image, and the tests give an image as well

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": CHAT_TEMPLATE}  # the one that chats get by default, where the tests look for it
