"""transformers' own configuration tests."""

import unittest

from transformers_tests.test_configuration_common import ConfigTester

from modeling_coca import CocaConfig, CocaTextConfig, CocaVisionConfig

SMALL = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SMALL, "num_multimodal_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}


class CompositeTester:
    @staticmethod
    def get_config():
        return CocaConfig(vision_config={**SMALL, "image_size": 36}, text_config=TEXT, projection_dim=16)


class CocaConfigTest(unittest.TestCase):
    model_tester = CompositeTester

    def test_config(self):
        ConfigTester(
            self, CocaConfig, has_text_modality=False, projection_dim=16, num_query_tokens=7
        ).run_common_tests()

    def test_text_config(self):
        ConfigTester(self, CocaTextConfig, **TEXT).run_common_tests()

    def test_vision_config(self):
        ConfigTester(self, CocaVisionConfig, has_text_modality=False, **SMALL).run_common_tests()

    def test_other_vision_config(self):
        inputs = {"vision_config": {"model_type": "vit", **SMALL}, "text_config": TEXT}
        tester = ConfigTester(self, CocaConfig, has_text_modality=False, **inputs)
        tester.create_and_test_config_to_json_file()
        tester.create_and_test_config_from_and_save_pretrained()
        tester.create_and_test_config_from_and_save_pretrained_composite()
