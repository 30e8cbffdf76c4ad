"""transformers' own training test: each class with a loss learns one batch by heart."""

import unittest

import torch
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_coca import (
    CocaConfig,
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaModel,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PIXEL_VALUES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class OverfitTester:
    """Upstream's test is written for language models: it asks the configuration for their fields."""

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        config = CocaConfig(
            vision_config={**SMALL, "image_size": 8, "patch_size": 4},
            text_config={
                **SMALL,
                "num_multimodal_layers": 1,
                "vocab_size": 99,
                "max_position_embeddings": 65,
                "bos_token_id": 97,
                "eos_token_id": 98,
            },
            projection_dim=16,
            num_query_tokens=3,
            num_pooler_attention_heads=4,
            num_labels=2,
        )
        config.vocab_size = config.text_config.vocab_size
        return config

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"input_ids": None}


class CocaTrainingTesterMixin(TrainingTesterMixin):
    model_tester = None
    training_overfit_seq_length = 12
    training_overfit_steps = 150

    def setUp(self):
        self.model_tester = OverfitTester(self)

    def _create_text_training_batch(self, *args, **kwargs):
        """Two texts and their images: upstream's has the same text twice."""
        batch = super()._create_text_training_batch(*args, **kwargs)
        batch["input_ids"][1] += 1
        return {"input_ids": batch["input_ids"], "pixel_values": PIXEL_VALUES}


class CocaForConditionalGenerationTrainingTest(CocaTrainingTesterMixin, unittest.TestCase):
    class OfOneImage(CocaForConditionalGeneration):
        def generate(self, inputs, **kwargs):
            return super().generate(inputs, pixel_values=PIXEL_VALUES[:1], **kwargs)

    all_model_classes = (OfOneImage,)

    def _create_text_training_batch(self, *args, **kwargs):
        batch = super()._create_text_training_batch(*args, **kwargs)
        return {**batch, "labels": batch["input_ids"]}


class CocaModelTrainingTest(CocaTrainingTesterMixin, unittest.TestCase):
    all_model_classes = (CocaModel,)

    def _create_text_training_batch(self, *args, **kwargs):
        return {**super()._create_text_training_batch(*args, **kwargs), "return_loss": True}


class CocaForVisualQuestionAnsweringTrainingTest(CocaTrainingTesterMixin, unittest.TestCase):
    all_model_classes = (CocaForVisualQuestionAnswering,)

    def _create_text_training_batch(self, *args, **kwargs):
        return {**super()._create_text_training_batch(*args, **kwargs), "labels": torch.tensor([0, 1])}


class CocaForImageClassificationTrainingTest(CocaTrainingTesterMixin, unittest.TestCase):
    all_model_classes = (CocaForImageClassification,)

    def _create_text_training_batch(self, *args, **kwargs):
        return {"pixel_values": PIXEL_VALUES, "labels": torch.tensor([0, 1])}
