import copy

import pytest
import torch

from modeling_coca import CocaForConditionalGeneration, CocaModel
from modeling_coca.training import count_parameters, freeze, freeze_unused, unfreeze


@pytest.fixture
def model(tiny_config):
    return CocaForConditionalGeneration(tiny_config(text_config={"dropout": 0.5}))


def batch(model):
    input_ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    labels = input_ids.masked_fill(input_ids == 0, -100)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": torch.randn(2, 3, 32, 32)}


def test_frozen_parts_get_no_gradient_and_stay_in_evaluation_mode(model):
    total = model.num_parameters()
    frozen = sum(p.numel() for part in (model.model.vision_model, model.lm_head) for p in part.parameters())
    assert freeze(model, "vision_model", "lm_head") == (total - frozen, frozen)
    for _ in range(2):  # `Trainer` calls train() before each step
        model.train()
        assert not any(module.training for module in model.model.vision_model.modules())
        assert model.text_decoder.training
    before = copy.deepcopy(model.model.vision_model.state_dict())
    model(**batch(model)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], value) for name, value in model.model.vision_model.state_dict().items())
    assert model.text_decoder.layers[0].self_block.mlp.fc1.weight.grad.abs().sum() > 0

    assert unfreeze(model, "vision_model", "lm_head") == (total, 0)
    assert all(module.training for module in model.train().modules())


def test_frozen_dropout_makes_no_noise(model):
    freeze(model, "text_model", "text_decoder")
    model.train()
    inputs = batch(model)
    first, second = (model(**inputs).loss.item() for _ in range(2))
    assert first == second
    unfreeze(model, "text_decoder")
    first, second = (model.train()(**inputs).loss.item() for _ in range(2))
    assert first != second


def test_part_of_a_frozen_part_can_be_thawed(model):
    freeze(model, "vision_model")
    last = model.model.vision_model.layers[1]
    assert unfreeze(model, "vision_model.layers.1").frozen == count_parameters(model).frozen
    model.train()
    assert all(p.requires_grad for p in last.parameters())
    assert last.self_attn.training
    assert not model.model.vision_model.layers[0].self_attn.training
    assert not any(p.requires_grad for p in model.model.vision_model.layers[0].parameters())


@pytest.mark.parametrize(
    "part",
    [
        "vision_model",
        "model.vision_model",
        "image_pooler.caption_pooler",
        "image_pooler.caption_pooler.query",
        "text_model.layers.0.mlp",
        "text_decoder.layers.1",
        "logit_scale",
        "text_projection.weight",
        "model",
    ],
)
def test_names_of_modules_and_parameters(model, part):
    assert count_parameters(model).frozen == 0
    frozen = freeze(model, part).frozen
    name = part if part.split(".")[0] in ("model", "text_decoder") else f"model.{part}"
    expected = [p for n, p in model.named_parameters() if n == name or n.startswith(name + ".")]
    assert frozen == sum(p.numel() for p in expected) > 0


def test_dual_encoder_and_compiled_model_take_the_same_names(model, tiny_config):
    dual = CocaModel(tiny_config())
    assert freeze(dual, "vision_model").frozen == dual.vision_model.num_parameters()
    compiled = torch.compile(model)  # nothing is compiled before the first call
    assert freeze(compiled, "vision_model").frozen == model.model.vision_model.num_parameters()


def test_unknown_part_lists_the_parts_and_changes_nothing(model):
    with pytest.raises(ValueError, match=r"no part 'visual'\. It has .*vision_model.*text_decoder.*lm_head") as error:
        freeze(model, "vision_model", "visual")
    for part in ("image_pooler", "text_model", "logit_scale", "visual_projection"):
        assert part in str(error.value)
    assert freeze(model).frozen == 0


def test_ddp_is_refused(model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="DDP"):
            freeze(wrapped, "vision_model")
        freeze(model, "vision_model")
        assert not wrapped.train().module.model.vision_model.training
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared", "none"])
@pytest.mark.parametrize("weights", [(1, 2), (0, 2), (1, 0)])
def test_what_is_left_after_freeze_unused_has_gradients(tiny_config, pooler_type, weights):
    contrastive, caption = weights
    model = CocaForConditionalGeneration(
        tiny_config(pooler_type=pooler_type, contrastive_loss_weight=contrastive, caption_loss_weight=caption)
    )
    model.train()
    unused = freeze_unused(model, batch(model))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model(**batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in unused) == (not parameter.requires_grad), name
    if weights == (1, 2):
        assert unused == []
    if caption == 0:
        assert any(name.startswith("text_decoder.") for name in unused)
        assert "lm_head.weight" in unused
    if contrastive == 0:
        assert {"model.logit_scale", "model.text_projection.weight", "model.text_model.class_embedding"} <= set(unused)


def test_freeze_unused_with_features_of_an_encoder(model):
    inputs = batch(model)
    inputs["image_hidden_states"] = torch.randn(2, 17, 32)
    del inputs["pixel_values"]
    unused = freeze_unused(model, inputs)
    assert set(unused) == {n for n, _ in model.named_parameters() if n.startswith("model.vision_model.")}
    with pytest.raises(ValueError, match="no loss"):
        freeze_unused(model, {k: v for k, v in inputs.items() if k != "labels"})
