"""transformers' own model tests on every public model class."""

import unittest

import torch
from torch import nn
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from modeling_coca import (
    CocaConfig,
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaModel,
    CocaTextConfig,
    CocaTextModel,
    CocaVisionConfig,
    CocaVisionModel,
)

BOS, EOS, PAD = 97, 98, 0


class VisionTester:
    is_training = False  # a tower has no loss, as in CLIP and SigLIP
    batch_size, image_size, patch_size, num_channels = 3, 8, 4, 3
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    seq_length = (image_size // patch_size) ** 2 + 1

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return CocaVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class TextTester:
    is_training = False
    batch_size, seq_length, vocab_size = 3, 7, 99
    encoder_seq_length = key_length = seq_length + 1  # hidden states and attentions have [CLS]
    hidden_size, num_hidden_layers, num_attention_heads = 32, 1, 4
    num_multimodal_layers = 1

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return CocaTextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers + self.num_multimodal_layers,
            num_multimodal_layers=self.num_multimodal_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=self.seq_length + 1,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], BOS - 1) + 1
        input_ids[:, 0] = BOS
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1:, -2:] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CocaTester:
    """For the composite models. The mixin's questions about layers and lengths are answered for the text stacks."""

    is_training = True
    num_hidden_layers = TextTester.num_hidden_layers + TextTester.num_multimodal_layers

    def __init__(self, parent):
        self.parent = parent
        self.vision_model_tester, self.text_model_tester = VisionTester(parent), TextTester(parent)
        for name in ("batch_size", "seq_length", "vocab_size", "hidden_size", "num_attention_heads"):
            setattr(self, name, getattr(self.text_model_tester, name))

    def get_config(self):
        return CocaConfig(
            vision_config=self.vision_model_tester.get_config(),
            text_config=self.text_model_tester.get_config(),
            projection_dim=16,
            num_query_tokens=3,
            num_pooler_attention_heads=4,
            # Half precision is compared with an absolute tolerance, for which CLIP's factor of 14 is too much
            logit_scale_init_value=0.0,
        )

    def prepare_config_and_inputs_for_common(self):
        _, texts = self.text_model_tester.prepare_config_and_inputs_for_common()
        _, images = self.vision_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), {**texts, **images}


class DualEncoderTester(CocaTester):
    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {**inputs, "return_loss": True}


class ImageClassificationTester(CocaTester):
    """The mixin's questions are answered for the image encoder."""

    num_hidden_layers = VisionTester.num_hidden_layers

    def __init__(self, parent):
        super().__init__(parent)
        self.seq_length = VisionTester.seq_length

    def prepare_config_and_inputs_for_common(self):
        _, images = self.vision_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), images


class CocaModelTesterMixin(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # dated by a copyright line, which we do not write

    def setUp(self):
        self.model_tester = self.model_tester_class(self)


class InputEmbeddingIsAConvolution:
    def test_model_get_set_embeddings(self):
        """As in CLIP's tests, but the setter is tried, too."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0](config)
        new = nn.Conv2d(3, config.get_text_config().hidden_size, kernel_size=4, stride=4, bias=False)
        assert isinstance(model.get_input_embeddings(), nn.Conv2d)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new
        assert model.get_output_embeddings() is None


class CocaVisionModelTest(InputEmbeddingIsAConvolution, CocaModelTesterMixin, unittest.TestCase):
    all_model_classes = (CocaVisionModel,)
    model_tester_class = VisionTester
    test_resize_embeddings = False


class CocaTextModelTest(CocaModelTesterMixin, unittest.TestCase):
    all_model_classes = (CocaTextModel,)
    model_tester_class = TextTester


class CocaModelTest(CocaModelTesterMixin, unittest.TestCase):
    all_model_classes = (CocaModel,)
    model_tester_class = DualEncoderTester
    additional_model_inputs = ("pixel_values",)
    _is_composite = True

    @unittest.skip("Attentions are those of the towers, which have tests of their own (as in CLIP)")
    def test_attention_outputs(self):
        pass

    @unittest.skip("Hidden states are those of the towers, which have tests of their own (as in CLIP)")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("Hidden states and attentions are those of the towers, which have tests of their own (as in CLIP)")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class CocaForConditionalGenerationTest(CocaModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (CocaForConditionalGeneration,)
    model_tester_class = CocaTester
    additional_model_inputs = ("pixel_values",)
    _is_composite = True


class CocaForVisualQuestionAnsweringTest(CocaModelTesterMixin, unittest.TestCase):
    all_model_classes = (CocaForVisualQuestionAnswering,)
    model_tester_class = CocaTester
    additional_model_inputs = ("pixel_values",)
    test_all_params_have_gradient = False  # the contrastive half is kept, and answers do not need it
    _is_composite = True

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """The mixin knows no answers from a list."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return {**inputs, "labels": torch.zeros(self.model_tester.batch_size).long()} if return_labels else inputs


class CocaForImageClassificationTest(InputEmbeddingIsAConvolution, CocaModelTesterMixin, unittest.TestCase):
    all_model_classes = (CocaForImageClassification,)
    model_tester_class = ImageClassificationTester
    test_resize_embeddings = False
    _is_composite = True
