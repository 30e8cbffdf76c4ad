"""Numbers at the edges: extreme logits and temperatures, tiny batches, every precision, any order and size of a batch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import TrainingArguments

from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.loss_coca import caption_loss, contrastive_loss, linear_cross_entropy
from modeling_coca.training import ClampLogitScaleCallback, CocaDataCollator, CocaTrainer

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
KINDS = ["softmax", "sigmoid"]


def reference(images, texts, scale, bias, kind):
    """In fp64, from the definition."""
    images, texts, scale, bias = (x.detach().double().requires_grad_() for x in (images, texts, scale, bias))
    logits = scale.exp() * images @ texts.t() + bias
    if kind == "sigmoid":
        signs = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
        loss = -F.logsigmoid(signs * logits).sum() / len(logits)
    else:
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    return loss.detach(), torch.autograd.grad(loss, (images, texts, scale, bias), allow_unused=True)


EMBEDDINGS = {
    "random": lambda n: torch.randn(n, 8),
    "all_equal": lambda n: torch.ones(n, 8),
    "opposite": lambda n: torch.ones(n, 8) * torch.tensor([1.0, -1.0]).repeat(n)[:n, None],
    "orthogonal": lambda n: torch.eye(8)[torch.arange(n) % 8],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_scale", [-80.0, 0.0, math.log(100), 20.0, 80.0])
@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("pairs", [1, 6])
def test_contrastive_losses_at_any_temperature(kind, dtype, log_scale, make, pairs):
    """From e^-80 to e^80: finite, and equal to fp64 on the same, rounded inputs."""
    images = F.normalize(make(pairs), dim=-1).to(dtype).requires_grad_()
    texts = F.normalize(make(pairs).flip(0), dim=-1).to(dtype).requires_grad_()
    scale, bias = torch.tensor([log_scale], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    inputs = (images, texts, scale, bias)
    loss = contrastive_loss(*inputs, kind, chunk_size=4)
    grads = torch.autograd.grad(loss, inputs)
    expected, expected_grads = reference(*inputs, kind)
    assert loss.dtype == torch.float32 and loss.isfinite()
    # Cancellation of numbers of the size of the logits
    size = math.exp(log_scale) * float(images.detach().float().norm(dim=-1).max() ** 2) + 10
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5 + 1e-6 * size)
    for grad, expected_grad, leaf in zip(grads, expected_grads, inputs, strict=True):
        assert grad.dtype == leaf.dtype
        if grad.dtype != torch.float16 or log_scale < 5:  # beyond, gradients are no fp16 numbers
            assert grad.isfinite().all()
        if log_scale < 5:
            tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[grad.dtype]
            largest = float(expected_grad.abs().max())
            finite = grad.isfinite()
            torch.testing.assert_close(
                grad.double()[finite],
                expected_grad[finite],
                rtol=tolerance,
                atol=tolerance * largest + 1e-6 + 3e-8 * size**2,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("vocabulary", [5, 1023, 2049], ids="vocabulary={}".format)
def test_captioning_loss_at_any_size_of_the_logits(dtype, factor, vocabulary):
    """Neither the vocabulary nor the number of tokens is a multiple of a chunk."""
    torch.manual_seed(0)
    hidden = (torch.randn(13, 16) * factor).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (13,))
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=5)
    grads = torch.autograd.grad(loss / 13, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    expected_grads = torch.autograd.grad(expected / 13, exact)
    overflows = dtype == torch.float16 and factor * 20 > 65_000  # the logits themselves are no fp16 numbers then
    if overflows:
        return
    assert loss.isfinite()
    step = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # of a logit, relative
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2 * step, atol=13 * step * 20 * max(factor, 1))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.isfinite().all() and grad.dtype == dtype
        if dtype == torch.float32 or factor <= 1:
            torch.testing.assert_close(
                grad.double(), expected_grad, rtol=20 * step, atol=20 * step * float(expected_grad.abs().max()) + 1e-6
            )


LABELS = {
    "none": lambda labels: labels.fill_(-100),
    "one": lambda labels: labels.fill_(-100).index_put_((torch.tensor(1), torch.tensor(3)), torch.tensor(7)),
    "first_positions": lambda labels: labels[:, 1:].fill_(-100),  # which no state predicts
    "a_row_without": lambda labels: labels[0].fill_(-100),
    "all": lambda labels: labels,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_labels_and_none(dtype, change, bias):
    torch.manual_seed(0)
    labels = torch.randint(0, 31, (2, 5))
    change(labels)
    head = nn.Linear(8, 31, bias=bias, dtype=dtype)
    hidden = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    loss = caption_loss(hidden, head, labels)
    loss.backward()
    wanted = labels[:, 1:].flatten()
    logits = F.linear(
        hidden.detach().double(), head.weight.detach().double(), head.bias.detach().double() if bias else None
    )
    if (wanted == -100).all():
        assert loss.item() == 0 and hidden.grad.abs().max() == 0 and head.weight.grad.abs().max() == 0
    else:
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100)
        step = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(loss.double(), expected, rtol=step, atol=step)
        assert hidden.grad.isfinite().all() and head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("before", "after"), [(-3.0, 0.0), (2.0, 2.0), (50.0, math.log(100)), (float("inf"), math.log(100))]
)
def test_the_clamp(dtype, before, after):
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor([before], dtype=dtype))
    ClampLogitScaleCallback().on_optimizer_step(None, None, None, model=model)
    assert model.logit_scale.item() == pytest.approx(after, rel=1e-2)
    assert 0 <= model.logit_scale.item() <= math.log(100) + (1e-6 if dtype == torch.float32 else 0.02)


# -------------------------------------------------------------------------------------------------------------- model


@pytest.fixture(scope="module")
def model(model_folder):
    return CocaForConditionalGeneration.from_pretrained(model_folder).eval()


def batch_of(model, rows, length=6):
    generator = torch.Generator().manual_seed(1)
    text, size = model.config.text_config, model.config.vision_config.image_size
    ids = torch.randint(3, text.vocab_size, (rows, length), generator=generator)
    ids[:, 0] = text.bos_token_id
    for row in range(rows):
        end = length - 1 - row % max(1, length - 2)
        ids[row, end] = text.eos_token_id
        ids[row, end + 1 :] = text.pad_token_id
    mask = (ids != text.pad_token_id).long()
    pixels = torch.randn(rows, 3, size, size, generator=generator)
    return {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "length", "equal"), [(1, 6, False), (1, 2, False), (5, 2, False), (5, 6, True)],
    ids=["one_row", "one_row_of_bos_and_eos", "bos_and_eos", "captions_all_equal"],
)  # fmt: skip
def test_small_and_equal_batches(model, dtype, rows, length, equal):
    """Losses are those of fp64 up to the type's precision, gradients are numbers."""
    batch = batch_of(model, rows, length)
    if equal:
        batch = {name: x if name == "pixel_values" else x[:1].expand_as(x).clone() for name, x in batch.items()}
    exact = copy.deepcopy(model).double()
    expected = exact(**{**batch, "pixel_values": batch["pixel_values"].double()})
    ours = copy.deepcopy(model).to(dtype).train()
    outputs = ours(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)})
    step = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for name in ("contrastive_loss", "caption_loss"):
        torch.testing.assert_close(outputs[name].double(), expected[name].double(), rtol=step, atol=step)
    if rows == 1:
        assert abs(outputs.contrastive_loss.item()) < 1e-5
    if equal:  # every text is as good as another
        assert outputs.contrastive_loss.item() >= math.log(rows) - step
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_texts_of_one_token(model):
    """BOS alone: an embedding and logits, and a captioning loss of nothing."""
    batch = {name: x[:, :1] if x.ndim == 2 else x for name, x in batch_of(model, 3).items()}
    outputs = model(**batch)
    assert outputs.caption_loss.item() == 0 and outputs.contrastive_loss.isfinite()
    del batch["labels"]
    assert model(**batch).logits.shape[:2] == (3, 1) and model(**batch).logits.isfinite().all()
    assert model.model(**batch).text_embeds.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_any_order_and_size_of_a_batch(model_folder, implementation):
    """Embeddings and logits to 1e-5, captions to the token."""
    model = CocaForConditionalGeneration.from_pretrained(model_folder, attn_implementation=implementation).eval()
    batch = batch_of(model, 7)
    batch.pop("labels")

    def compute(rows):
        part = {name: x[rows] for name, x in batch.items()}
        with torch.no_grad():
            outputs, logits = model.model(**part), model(**part).logits
        captions = model.generate(part["pixel_values"], max_new_tokens=6, num_beams=2)
        captions = F.pad(captions, (0, 12 - captions.shape[1]))
        is_end = (captions == model.config.text_config.eos_token_id).long()
        captions[is_end.cumsum(-1) > is_end] = 0  # after the first EOS, beam search fills up with EOS
        return [outputs.image_embeds, outputs.text_embeds, logits, captions]

    real = batch["attention_mask"].bool()
    whole = compute(torch.arange(7))
    orders = [torch.arange(7).flip(0), torch.randperm(7, generator=torch.Generator().manual_seed(3))]
    splits = [[order] for order in orders] + [list(orders[1].split(size)) for size in (1, 2, 3)]
    for split in splits:
        parts = [compute(rows) for rows in split]
        rows = torch.cat(split)
        for i, expected in enumerate(whole):
            found = torch.cat([part[i] for part in parts])
            expected = expected[rows]
            if i == 2:  # positions of padding hold nothing
                found, expected = found[real[rows]], expected[real[rows]]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_pairs_changes_no_loss(kind):
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(40, 16), dim=-1) for _ in range(2))
    scale, bias = torch.tensor([math.log(50)]), torch.tensor([-5.0])
    expected = contrastive_loss(images, texts, scale, bias, kind)
    order = torch.randperm(40)
    for chunk_size in (1, 7, 40, 1000):
        loss = contrastive_loss(images[order], texts[order], scale, bias, kind, chunk_size=chunk_size)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ trainer


def train(model_folder, output, rows, **arguments):
    processor = CocaProcessor.from_pretrained(model_folder, backend="pil")
    model = CocaForConditionalGeneration.from_pretrained(
        model_folder, text_config={"dropout": 0.1}, logit_scale_init_value=4.0
    )
    trainer = CocaTrainer(
        model,
        TrainingArguments(
            output,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 5, **arguments},
        ),
        CocaDataCollator(processor),
        train_dataset=rows,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: x.clone() for name, x in model.state_dict().items()}


@pytest.fixture(scope="module")
def rows(photos):
    texts = ["a red square", "a drawing of a circle", "yellow", "a photo of a blue square"]
    return [
        {"image": Image.open(path).convert("RGB"), "text": [texts[i % 4], texts[(i + 1) % 4]]}
        for i, path in enumerate(sorted(photos.glob("*.*")))
    ]


def test_one_seed_is_one_training(model_folder, rows, tmp_path):
    """Order of the rows, choice of captions, dropout: the same to the bit, and another with another seed."""
    first, again = (train(model_folder, tmp_path / str(i), rows) for i in range(2))
    assert first[0] == again[0]
    assert all(torch.equal(x, again[1][name]) for name, x in first[1].items())
    other = train(model_folder, tmp_path / "other", rows, seed=6)
    assert other[0] != first[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"learning_rate": 1.0, "max_grad_norm": 0.0},  # far too much
    ],
    ids=["fp32", "bf16", "accumulated", "wild"],
)
def test_batches_of_one_example(arguments, model_folder, rows, tmp_path):
    """The contrastive loss is 0 then, and the captioning loss trains; the temperature stays in its bounds."""
    losses, weights = train(model_folder, tmp_path, rows[:3], per_device_train_batch_size=1, **arguments)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert all(x.isfinite().all() for x in weights.values())
    assert 0 <= weights["model.logit_scale"].item() <= math.log(100) + 1e-5


def test_captions_that_are_all_equal(model_folder, rows, tmp_path):
    equal = [{**row, "text": "a red square"} for row in rows[:4]]
    losses, weights = train(model_folder, tmp_path, equal, max_steps=6)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert all(x.isfinite().all() for x in weights.values())
