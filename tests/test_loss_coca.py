"""`loss_coca`: the captioning loss in chunks and both contrastive losses, against the plain formulas."""

import faulthandler
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_coca.loss_coca as loss_coca
from modeling_coca.loss_coca import caption_loss, contrastive_loss, linear_cross_entropy

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOKENS, WIDTH, VOCABULARY = 13, 8, 31


@pytest.fixture
def problem():
    """Hidden states, output weight (both with gradients) and labels."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,))


def plain(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def recorded_linear_shapes(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of everything that is multiplied by an output layer."""
    shapes, linear = [], F.linear

    def record(inputs, weight, *args, **kwargs):
        if weight.shape == (VOCABULARY, WIDTH):
            shapes.append(tuple(inputs.shape))
        return linear(inputs, weight, *args, **kwargs)

    monkeypatch.setattr(F, "linear", record)
    return shapes


# ----------------------------------------------------------------------------------------------- linear_cross_entropy


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12, 13, 14, 1024])
def test_chunks_equal_the_full_logits(problem, chunk_size):
    hidden, weight, labels = problem
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size)
    expected = plain(hidden, weight, labels)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    factor = torch.tensor(0.37)
    grads = torch.autograd.grad(factor * loss, (hidden, weight))
    expected_grads = torch.autograd.grad(factor * expected, (hidden, weight))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_double_precision_is_kept(problem, chunk_size):
    hidden, weight, labels = (x.detach().double().requires_grad_() if x.is_floating_point() else x for x in problem)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gradcheck():
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (5,))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 2), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(problem, dtype):
    hidden, weight, labels = problem
    half_hidden, half_weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    loss = linear_cross_entropy(half_hidden, half_weight, labels, 4)
    reference = [x.detach().float().requires_grad_() for x in (half_hidden, half_weight)]
    expected = plain(*reference, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    grads, expected_grads = (
        torch.autograd.grad(loss, (half_hidden, half_weight)),
        torch.autograd.grad(expected, reference),
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.float(), expected_grad, rtol=0.05, atol=0.03)


def test_large_logits_stay_finite(problem):
    hidden, weight, labels = problem
    loss = linear_cross_entropy(hidden * 1000, weight, labels, 4)
    torch.testing.assert_close(loss, plain(hidden * 1000, weight, labels))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_autocast_makes_the_logits_in_its_dtype(problem):
    hidden, weight, labels = problem
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 4)
        expected = plain(hidden, weight, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0.05, atol=0.03)


@pytest.mark.parametrize(("need_hidden", "need_weight"), [(True, False), (False, True)], ids=["hidden", "weight"])
def test_one_gradient_only(problem, need_hidden, need_weight):
    hidden, weight, labels = problem
    expected = torch.autograd.grad(plain(hidden, weight, labels), hidden if need_hidden else weight)[0]
    hidden, weight = hidden.detach().requires_grad_(need_hidden), weight.detach().requires_grad_(need_weight)
    linear_cross_entropy(hidden, weight, labels, 4).backward()
    torch.testing.assert_close(hidden.grad if need_hidden else weight.grad, expected, rtol=1e-5, atol=1e-6)
    assert (weight if need_hidden else hidden).grad is None


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("grad_mode", "products"), [(torch.no_grad, 1), (torch.enable_grad, 3)], ids=["no_grad", "grad"]
)
def test_gradients_are_formed_only_where_they_are_wanted(problem, grad_mode, products):
    """Evaluation pays for the logits alone, though the parameters require gradients."""
    hidden, weight, labels = problem
    with grad_mode(), CountProducts() as products_made:
        loss = linear_cross_entropy(hidden, weight, labels, 4)
    torch.testing.assert_close(loss, plain(hidden, weight, labels), rtol=1e-6, atol=1e-5)
    assert products_made.count == products * 4  # of 4 chunks


def test_nothing_of_size_tokens_x_vocabulary_is_kept(problem):
    hidden, weight, labels = problem
    hidden = hidden.detach().repeat(20, 1).requires_grad_()
    labels = labels.repeat(20)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, labels, 4)
        assert 0 < max(sizes) <= max(hidden.numel(), weight.numel()) < hidden.shape[0] * VOCABULARY
        sizes.clear()
        plain(hidden, weight, labels)  # the measure works
        assert max(sizes) == hidden.shape[0] * VOCABULARY


def test_at_most_a_chunk_of_logits_at_a_time(problem, monkeypatch):
    hidden, weight, labels = problem
    shapes = recorded_linear_shapes(monkeypatch)
    linear_cross_entropy(hidden, weight, labels, 5)
    assert shapes == [(5, WIDTH), (5, WIDTH), (3, WIDTH)]


@pytest.mark.parametrize("rows", [3000, 40], ids=["one_part", "parts"])
def test_gradients_of_the_weight_are_summed_in_parts(rows, monkeypatch):
    """The vocabulary is no multiple of the parts in which products are added."""
    monkeypatch.setattr(loss_coca, "_WORDS", rows)
    torch.manual_seed(0)
    inputs = torch.randn(30, WIDTH, requires_grad=True), torch.randn(101, WIDTH, requires_grad=True)
    labels = torch.randint(0, 101, (30,))
    grads = torch.autograd.grad(0.5 * linear_cross_entropy(*inputs, labels, 8), inputs)
    expected = torch.autograd.grad(0.5 * plain(*inputs, labels), inputs)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_one_gradient_of_the_size_of_the_weight_is_in_memory(monkeypatch):
    """From the forward to the end of the backward pass: beside it there is a chunk of logits, and no second of either."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from peak_memory import PeakMemory

    monkeypatch.setattr(loss_coca, "_WORDS", 500)
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(20_000, 32, requires_grad=True)
    labels = torch.randint(0, len(weight), (64,))
    with PeakMemory() as memory:
        torch.autograd.grad(0.3 * linear_cross_entropy(hidden, weight, labels, 16), (hidden, weight))
    logits = 16 * len(weight) * 4
    assert weight.nbytes + logits <= memory.peak < 1.05 * (weight.nbytes + logits)


def test_a_graph_that_is_kept_gives_its_gradients_again(problem):
    """They are scaled in place only where nobody comes back for them."""
    hidden, weight, labels = problem
    inputs = (hidden, weight)
    expected = torch.autograd.grad(plain(hidden, weight, labels), inputs)
    loss = linear_cross_entropy(hidden, weight, labels, 4)
    first = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    kept = [grad.clone() for grad in first]
    (0.5 * loss).backward(retain_graph=True)
    (0.25 * loss).backward()
    torch.testing.assert_close(list(first), kept, rtol=0, atol=0)
    for leaf, grad, plain_grad in zip(inputs, first, expected, strict=True):
        torch.testing.assert_close(grad, 3 * plain_grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf.grad, 0.75 * plain_grad, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_loss(problem, use_reentrant):
    hidden, weight, labels = problem
    expected = torch.autograd.grad(0.3 * plain(hidden, weight, labels), (hidden, weight))
    loss = torch.utils.checkpoint.checkpoint(
        linear_cross_entropy, hidden, weight, labels, 4, use_reentrant=use_reentrant
    )
    (0.3 * loss).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- caption_loss


@pytest.fixture
def caption():
    """A batch of decoder states, an output layer, and labels with a prefix and padding that have no loss."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 6))
    labels[0, :3] = -100
    labels[1, 4:] = -100
    return hidden, nn.Linear(WIDTH, VOCABULARY, bias=False), labels


def plain_caption(hidden, lm_head, labels):
    """Mean over the labelled tokens, each predicted from the position before."""
    logits = lm_head(hidden)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def test_caption_loss_shifts_and_averages(caption):
    hidden, lm_head, labels = caption
    inputs = (hidden, lm_head.weight)
    loss, expected = caption_loss(hidden, lm_head, labels), plain_caption(hidden, lm_head, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), rtol=1e-5, atol=1e-6
    )


def test_shift_labels_are_taken_as_they_are(caption):
    hidden, lm_head, labels = caption
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    expected = caption_loss(hidden, lm_head, labels)
    assert caption_loss(hidden, lm_head, labels, shift_labels=shifted) == expected
    assert caption_loss(hidden, lm_head, torch.full_like(labels, -100), shift_labels=shifted) == expected
    # the last position has a label, too
    full = labels.clamp(min=0)
    expected = F.cross_entropy(lm_head(hidden).flatten(0, 1), full.flatten())
    torch.testing.assert_close(caption_loss(hidden, lm_head, labels, shift_labels=full), expected)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_num_items_in_batch_is_the_divisor(caption, as_tensor):
    hidden, lm_head, labels = caption
    count = int((labels[:, 1:] != -100).sum())
    loss = caption_loss(hidden, lm_head, labels, num_items_in_batch=torch.tensor(40) if as_tensor else 40)
    torch.testing.assert_close(loss, caption_loss(hidden, lm_head, labels) * count / 40)


def test_only_labelled_tokens_meet_the_output_layer(caption, monkeypatch):
    hidden, lm_head, labels = caption
    shapes = recorded_linear_shapes(monkeypatch)
    caption_loss(hidden, lm_head, labels)
    assert shapes == [(int((labels[:, 1:] != -100).sum()), WIDTH)]


def test_unlabelled_states_do_not_matter(caption):
    """Even if they are not numbers: neither the loss nor the gradients of the rest see them."""
    hidden, lm_head, labels = caption
    labelled = F.pad(labels, (0, 1), value=-100)[:, 1:] != -100
    poisoned = hidden.detach().masked_fill(~labelled[..., None], float("nan")).requires_grad_()
    loss = caption_loss(poisoned, lm_head, labels)
    assert loss == caption_loss(hidden, lm_head, labels)
    hidden_grad, weight_grad = torch.autograd.grad(loss, (poisoned, lm_head.weight))
    assert weight_grad.isfinite().all()
    assert (hidden_grad[~labelled] == 0).all() and (hidden_grad[labelled] != 0).any()


@pytest.mark.parametrize("adapter", [False, True], ids=["linear", "adapter"])
def test_no_labels_at_all(caption, adapter):
    hidden, lm_head, labels = caption
    layer = nn.Sequential(lm_head) if adapter else lm_head
    loss = caption_loss(hidden, layer, torch.full_like(labels, -100))
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, (hidden, lm_head.weight))
    assert [bool((grad == 0).all()) for grad in grads] == [True, True]


class AdapterLinear(nn.Linear):
    """What an adapter library puts in the place of `lm_head`: a subclass with a branch of its own."""

    def __init__(self):
        super().__init__(WIDTH, VOCABULARY, bias=False)
        self.low_rank = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, VOCABULARY, bias=False))

    def forward(self, hidden):
        return super().forward(hidden) + self.low_rank(hidden)


@pytest.mark.parametrize(
    "make_head",
    [
        pytest.param(AdapterLinear, id="subclass"),
        pytest.param(lambda: nn.Linear(WIDTH, VOCABULARY), id="bias"),
        pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, VOCABULARY, bias=False)), id="wrapped"),
    ],
)
def test_other_output_layers(caption, make_head):
    hidden, _, labels = caption
    torch.manual_seed(1)
    lm_head = make_head()
    loss, expected = caption_loss(hidden, lm_head, labels), plain_caption(hidden, lm_head, labels)
    inputs = (hidden, *lm_head.parameters())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), rtol=1e-5, atol=1e-6
    )


def test_other_output_layers_are_chunked(monkeypatch):
    """Their logits, too, are there for a chunk of tokens only, in both passes."""
    torch.manual_seed(0)
    lm_head = nn.Linear(WIDTH, VOCABULARY)
    hidden, labels = torch.randn(2, 9, WIDTH, requires_grad=True), torch.randint(0, VOCABULARY, (2, 9))
    expected = torch.autograd.grad(plain_caption(hidden, lm_head, labels), (hidden, *lm_head.parameters()))
    monkeypatch.setattr(loss_coca, "CHUNK_SIZE", 5)
    shapes = recorded_linear_shapes(monkeypatch)
    loss = caption_loss(hidden, lm_head, labels)
    grads = torch.autograd.grad(loss, (hidden, *lm_head.parameters()))
    assert set(shapes) == {(5, WIDTH), (1, WIDTH)}
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_wrapped_linear_equals_the_plain_one(caption):
    hidden, lm_head, labels = caption
    torch.testing.assert_close(
        caption_loss(hidden, nn.Sequential(lm_head), labels),
        caption_loss(hidden, lm_head, labels),
        rtol=1e-6,
        atol=1e-6,
    )


def test_more_tokens_than_a_chunk():
    """The default chunk size is crossed."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(3, 500, WIDTH), torch.randint(0, VOCABULARY, (3, 500))
    lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    torch.testing.assert_close(
        caption_loss(hidden, lm_head, labels), plain_caption(hidden, lm_head, labels), rtol=1e-5, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------- contrastive_loss

KINDS = ("softmax", "sigmoid")


def pairs(count, dtype=torch.float32):
    """Normalised embeddings of images and texts, the scale's logarithm and a bias, all with gradients."""
    torch.manual_seed(0)
    image_embeds, text_embeds = (F.normalize(torch.randn(count, 6, dtype=dtype), dim=-1) for _ in range(2))
    parameters = torch.tensor([1.5], dtype=dtype), torch.tensor([-2.0], dtype=dtype)
    return [x.requires_grad_() for x in (image_embeds, text_embeds, *parameters)]


def plain_contrastive_loss(image_embeds, text_embeds, logit_scale, logit_bias=None, kind="softmax"):
    logits = logit_scale.exp() * image_embeds @ text_embeds.t()
    if logit_bias is not None:
        logits = logits + logit_bias
    if kind == "sigmoid":
        count = len(logits)
        terms = [F.logsigmoid(logits[i, j] if i == j else -logits[i, j]) for i in range(count) for j in range(count)]
        return -torch.stack(terms).sum() / count
    by_image = logits.exp().sum(dim=1).log() - logits.diag()
    by_text = logits.exp().sum(dim=0).log() - logits.diag()
    return (by_image.mean() + by_text.mean()) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_contrastive_loss_equals_the_plain_formula(kind, chunk_size, with_bias):
    inputs = pairs(7, torch.float64)[: 4 if with_bias else 3]
    loss = contrastive_loss(*inputs, kind=kind, chunk_size=chunk_size)
    expected = plain_contrastive_loss(*inputs, kind=kind)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(0.3 * loss, inputs), torch.autograd.grad(0.3 * expected, inputs), rtol=1e-10, atol=1e-12
    )


def test_images_and_texts_may_be_swapped():
    image_embeds, text_embeds, logit_scale, _ = pairs(5)
    loss = contrastive_loss(image_embeds, text_embeds, logit_scale)
    torch.testing.assert_close(contrastive_loss(text_embeds, image_embeds, logit_scale), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_half_precision_embeddings_are_in_fp32(kind):
    """bf16 logits near 100 are 0.5 apart; fp32 ones of the same embeddings lose nothing, with and without autocast."""
    image_embeds, text_embeds, _, logit_bias = [x.detach().bfloat16() for x in pairs(5)]
    logit_scale = torch.tensor(100.0).log()
    loss = contrastive_loss(image_embeds, text_embeds, logit_scale, logit_bias, kind)
    exact = [x.double() for x in (image_embeds, text_embeds, logit_scale, logit_bias)]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), contrastive_loss(*exact, kind), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(image_embeds, text_embeds, logit_scale, logit_bias, kind), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pair(kind):
    embeds = torch.ones(1, 1)
    expected = 0.0 if kind == "softmax" else -F.logsigmoid(torch.tensor(2.0)).item()
    assert contrastive_loss(embeds, embeds, torch.tensor(2.0).log(), kind=kind).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs(kind):
    embeds = torch.ones(3, 2, requires_grad=True)
    none = embeds[torch.zeros(3, dtype=torch.bool)]
    loss = contrastive_loss(none, none, torch.zeros(1), kind=kind)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, embeds)[0], torch.zeros(3, 2))


def test_one_text_for_each_image():
    with pytest.raises(ValueError, match="got 2 images and 3 texts"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_all_pairs_are_never_in_memory(kind):
    """Neither in the forward nor in the backward pass: the largest tensor is a chunk of logits."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (output if isinstance(output, tuple) else (output,)) if hasattr(x, "numel"))
            return output

    inputs = pairs(64)
    with Sizes():
        contrastive_loss(*inputs, kind=kind, chunk_size=8).backward()
    assert max(sizes) == 8 * 64


def run_processes(function, processes, *args):
    """Runs `function(rank, processes, *args)` in gloo processes. Any warning of torch that an API is deprecated fails."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_start, (function, processes, folder, *args), nprocs=processes)


def _start(rank, function, processes, folder, *args):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240, exit=True)  # a process that waits for ever says where
    warnings.filterwarnings("error", category=FutureWarning)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        function(rank, processes, *args)
    finally:
        torch.distributed.destroy_process_group()


def assert_equals_one_process(rank, processes):
    """Mean over processes of value and gradients = the plain loss of all pairs, however they are spread."""
    group = torch.distributed.group.WORLD
    spreads = [[4] * processes, [3 * r + 1 for r in range(processes)], [0] * (processes - 1) + [5], [0] * processes]
    for counts in spreads:
        for kind in KINDS:
            first, count = sum(counts[:rank]), counts[rank]
            whole, parts = pairs(sum(counts), torch.float64), pairs(sum(counts), torch.float64)
            image_embeds, text_embeds, *parameters = parts
            mine = slice(first, first + count)
            loss = contrastive_loss(image_embeds[mine], text_embeds[mine], *parameters, kind, group, chunk_size=3)
            loss.backward()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            for part in parts:
                torch.distributed.all_reduce(part.grad)
            if not sum(counts):
                assert total == 0 and all((part.grad == 0).all() for part in parts)
                continue
            expected = plain_contrastive_loss(*whole, kind=kind)
            expected.backward()
            torch.testing.assert_close(total / processes, expected.detach(), rtol=1e-12, atol=1e-12)
            for part, one in zip(parts, whole, strict=True):
                torch.testing.assert_close(part.grad / processes, one.grad, rtol=1e-10, atol=1e-12)

    torch.manual_seed(0)
    hidden, weight = torch.randn(processes, 4, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(0, VOCABULARY, (processes, 4))
    labels[0, 1:] = -100  # processes with different numbers of labels, one with none
    lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    lm_head.weight = nn.Parameter(weight)
    loss = caption_loss(hidden[rank, None], lm_head, labels[rank, None], group=group)
    (grad,) = torch.autograd.grad(loss, lm_head.weight)
    expected = plain_caption(hidden, lm_head, labels)
    (expected_grad,) = torch.autograd.grad(expected, lm_head.weight)
    loss = loss.detach()
    for mine, one in ((loss, expected), (grad, expected_grad)):
        torch.distributed.all_reduce(mine)
        torch.testing.assert_close(mine / processes, one.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_one(processes):
    run_processes(assert_equals_one_process, processes)


def test_ignored_label_is_the_one_of_transformers():
    assert loss_coca.IGNORE_INDEX == -100
