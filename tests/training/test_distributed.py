"""Several processes train as one: DDP and FSDP2 on gloo, tensor parallelism, and the engines that `accelerate launch` starts."""

import copy
import datetime
import faulthandler
import functools
import tempfile
import types
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from packaging.version import Version
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.evaluation import (
    CaptioningEvaluator,
    QuestionAnsweringEvaluator,
    RetrievalEvaluator,
    ZeroShotClassificationEvaluator,
)

# On CPUs it does not run with PyTorch 2.6, and not over layers that are recomputed with 2.7
HAS_FSDP2 = Version(torch.__version__) >= Version("2.8")
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}  # in fp64


def spawn(function, processes, *args):
    """Runs `function(rank, *args)` in gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_start, (function, processes, folder, *args), nprocs=processes)


def _start(rank, function, processes, folder, *args):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(900, exit=True)  # a process that waits for ever says where
    # A collective that torch is about to drop must not be used
    warnings.filterwarnings("error", message=r".*torch\.distributed.*deprecated.*", category=FutureWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",  # no port that another process may have
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(minutes=10),  # of a collective: the error names it
    )
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def make_batch(rows):
    """Captions of different lengths, so that processes have different numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.arange(rows)[:, None] * 5 % 7 + 3
    input_ids = torch.randint(3, 500, (rows, 9), generator=generator)
    attention_mask = (torch.arange(9) < lengths).long()
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
        "pixel_values": torch.randn(rows, 3, 32, 32, generator=generator, dtype=torch.float64),
    }


def rows_of(batch, rank, counts):
    start = sum(counts[:rank])
    return {name: value[start : start + counts[rank]] for name, value in batch.items()}


def mean_losses(outputs):
    values = [outputs.loss, outputs.get("contrastive_loss"), outputs.get("caption_loss")]
    values = torch.stack([value.detach() for value in values if value is not None])
    dist.all_reduce(values)
    return values / dist.get_world_size()


def fsdp2(model):
    """Sharded by the function that accelerate's FSDP2 calls; accelerate itself takes FSDP on accelerators only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    accelerator = types.SimpleNamespace(
        state=state, device=torch.device("cpu"), mixed_precision="no", is_main_process=False, torch_device_mesh=None
    )
    return fsdp2_prepare_model(accelerator, model)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_trains_as_one(rank, wrap, model, batch, counts, **kwargs):
    """Losses and gradients of `wrap(model)` on each process's rows are those of one process on all of them."""
    one = copy.deepcopy(model).train()
    one._loss_group = lambda: None  # a process on its own
    expected = one(**batch)
    expected.loss.backward()
    expected_grads = {name: p.grad for name, p in one.named_parameters()}

    several = wrap(copy.deepcopy(model).train())
    outputs = several(**rows_of(batch, rank, counts), **kwargs)
    outputs.loss.backward()
    names = ("loss", "contrastive_loss", "caption_loss")
    expected = torch.stack([expected[name].detach() for name in names if expected.get(name) is not None])
    torch.testing.assert_close(mean_losses(outputs), expected, **TOLERANCE)
    for name, parameter in several.named_parameters():
        grad, expected_grad = whole(parameter.grad), expected_grads[name.removeprefix("module.")]
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def check_ddp_and_fsdp2(rank, configs):
    processes = dist.get_world_size()
    even, uneven = [4] * processes, [4 + r for r in range(processes)]
    for config in configs:
        torch.manual_seed(0)
        model = CocaForConditionalGeneration(config).double()
        run = functools.partial(assert_trains_as_one, rank)
        batch = make_batch(sum(even))
        run(DistributedDataParallel, model, batch, even)
        run(DistributedDataParallel, model, batch, even, contrastive_chunk_size=3)
        run(DistributedDataParallel, model, make_batch(sum(uneven)), uneven)
        run(DistributedDataParallel, model, make_batch(sum(uneven)), uneven, contrastive_chunk_size=3)
        masked = {**batch, "contrastive_mask": torch.arange(sum(even)) < 5}  # the last process has one pair, or none
        run(DistributedDataParallel, model, masked, even)
        if not HAS_FSDP2:
            continue
        run(fsdp2, model, batch, even)
        run(fsdp2, model, batch, even, contrastive_chunk_size=3)
        run(fsdp2, model, make_batch(sum(uneven)), uneven, contrastive_chunk_size=3)
        model.gradient_checkpointing_enable()
        run(fsdp2, model, batch, even)
        run(fsdp2, model, batch, even, contrastive_chunk_size=3)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ddp_and_fsdp2_train_as_one_process(tiny_config, processes):
    # Tied weights, and the layout without poolers: FSDP2 wraps both in its own way
    sigmoid = tiny_config(contrastive_loss="sigmoid", tie_word_embeddings=True, pooler_type="none", num_query_tokens=16)
    spawn(check_ddp_and_fsdp2, processes, [tiny_config(), sigmoid])


def evaluators(processor):
    """Of each kind, over five batches of two rows: two processes have three and two of them."""
    generator = np.random.default_rng(0)
    words = "a photo of a red square, a drawing of a green circle, what is it, yellow blue white".split(", ")
    rows = [
        {
            "image": Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
            "text": f"{words[i % 4]} {i}",
            "question": " ".join(["what"] * (1 + i % 5)),  # prompts of unequal length
            "label": i % 3,
        }
        for i in range(9)
    ]
    shared = {"batch_size": 2}
    names = ["red", "green", "blue"]
    return [
        RetrievalEvaluator(processor, rows, extra_texts=["white"], extra_images=rows[:3], ks=(1, 2), **shared),
        ZeroShotClassificationEvaluator(processor, rows, class_names=names, per_class=True, **shared),
        CaptioningEvaluator(processor, rows, generation_kwargs={"guidance_scale": 2.0}, **shared),
        QuestionAnsweringEvaluator(processor, rows, answer_column="text", **shared),
    ]


def evaluate(evaluators, model, **kwargs):
    figures = [evaluator(model, show_progress=False, **kwargs) for evaluator in evaluators]
    return figures, [getattr(evaluator, "predictions", None) for evaluator in evaluators]


def check_evaluators(rank, folder, config):
    from peft import LoraConfig, get_peft_model

    """The figures and texts of one process, to the bit, and training goes on as if there had been no evaluation."""
    processor = CocaProcessor.from_pretrained(folder)
    some = evaluators(processor)
    model = CocaForConditionalGeneration.from_pretrained(folder)
    calls = []
    hook = model.model.image_pooler.register_forward_hook(lambda *_: calls.append(rank))
    expected = evaluate(some, model)
    assert len(set(expected[1][2])) > 1 and len(set(expected[1][3])) > 1
    alone = len(calls)  # five batches each, two of `extra_images`, and the null images of the guidance
    calls.clear()
    assert evaluate(some, DistributedDataParallel(model), shared=True) == expected
    assert alone == 5 * 4 + 2 + 5 and len(calls) == 3 * 4 + 1 + 3
    hook.remove()
    lora = LoraConfig(target_modules=r".*text_decoder.*v_proj", init_lora_weights=True)
    for wrap in (fsdp2, lambda model: fsdp2(get_peft_model(model, lora))):
        sharded = wrap(copy.deepcopy(model))
        for shared in (True, False):
            assert evaluate(some, sharded, shared=shared) == expected
            assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())

    torch.manual_seed(0)
    model = CocaForConditionalGeneration(config).double()

    def wrap(model):
        sharded = fsdp2(model)
        evaluate(evaluators(processor)[::2], sharded, shared=True)
        return sharded

    for kwargs in ({}, {"contrastive_chunk_size": 3}):
        assert_trains_as_one(rank, wrap, model, make_batch(8), [4, 4], **kwargs)


@pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 on CPUs needs PyTorch 2.8 or newer")
def test_evaluators_share_a_data_set(tiny_config, model_folder):
    pytest.importorskip("peft")
    spawn(check_evaluators, 2, str(model_folder), tiny_config())


def check_native_fsdp2_and_tensor_parallelism(rank, folder):
    """`from_pretrained(distributed_config=...)` of transformers: losses and gradients, and the tokens, of one process."""
    torch.manual_seed(0)
    one = CocaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).train()
    batch, counts = make_batch(8), [4, 4]
    one._loss_group = lambda: None
    expected = one(**batch)
    expected.loss.backward()
    expected_grads = {name: p.grad for name, p in one.named_parameters()}
    expected_tokens = one.eval().generate(pixel_values=batch["pixel_values"][:2], max_new_tokens=4, do_sample=False)

    for sizes in ({"fsdp_size": 2}, {"tp_size": 2}):
        several = CocaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float64, distributed_config=DistributedConfig(**sizes)
        ).train()
        # Tensor-parallel processes share a batch
        rows = rows_of(batch, rank, counts) if "fsdp_size" in sizes else batch
        for changes in ({}, {"contrastive_chunk_size": 3}):
            case = f"{sizes} {changes}"
            several.zero_grad()
            outputs = several(**rows, **changes)
            outputs.loss.backward()
            expected_losses = torch.stack([expected.loss, expected.contrastive_loss, expected.caption_loss]).detach()
            torch.testing.assert_close(mean_losses(outputs), expected_losses, **TOLERANCE)
            for name, parameter in several.named_parameters():
                grad, expected_grad = whole(parameter.grad), expected_grads[name]
                assert torch.allclose(grad, expected_grad, **TOLERANCE), f"{case} {name}"
        if "tp_size" in sizes:
            tokens = several.eval().generate(pixel_values=batch["pixel_values"][:2], max_new_tokens=4, do_sample=False)
            assert torch.equal(tokens, expected_tokens)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 on CPUs needs PyTorch 2.8 or newer")
def test_distributed_loading_of_transformers(tiny_config, tmp_path, capfd):
    torch.manual_seed(0)
    CocaForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    spawn(check_native_fsdp2_and_tensor_parallelism, 2, str(tmp_path))
    assert "match nothing" not in capfd.readouterr().err  # every rule of the plans names something
