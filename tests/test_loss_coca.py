"""`loss_coca`: the captioning loss in chunks and both contrastive losses, against the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_coca.loss_coca as loss_coca
from modeling_coca.loss_coca import caption_loss, contrastive_loss, linear_cross_entropy

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
    """Leading shapes of everything that is multiplied by an output layer."""
    shapes, linear = [], F.linear

    def record(inputs, *args, **kwargs):
        shapes.append(tuple(inputs.shape))
        return linear(inputs, *args, **kwargs)

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


def test_softmax_is_the_mean_over_both_directions():
    torch.manual_seed(0)
    logits = torch.randn(5, 5, requires_grad=True)
    by_image = -logits.diag().sub(logits.exp().sum(dim=1).log()).mean()
    by_text = -logits.diag().sub(logits.exp().sum(dim=0).log()).mean()
    expected = (by_image + by_text) / 2
    loss = contrastive_loss(logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    assert contrastive_loss(logits, "softmax") == loss
    torch.testing.assert_close(contrastive_loss(logits.t()), loss)


def test_sigmoid_sums_the_texts_of_an_image():
    torch.manual_seed(0)
    logits = torch.randn(4, 4, requires_grad=True)
    terms = [-torch.log(torch.sigmoid(logits[i, j] if i == j else -logits[i, j])) for i in range(4) for j in range(4)]
    expected = torch.stack(terms).sum() / 4
    loss = contrastive_loss(logits, "sigmoid")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_half_precision_logits_are_upcast(kind):
    torch.manual_seed(0)
    logits = torch.randn(4, 4).bfloat16()
    loss = contrastive_loss(logits, kind)
    assert loss.dtype == torch.float32
    assert loss == contrastive_loss(logits.float(), kind)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_one_pair(kind):
    logits = torch.tensor([[2.0]])
    expected = 0.0 if kind == "softmax" else -F.logsigmoid(torch.tensor(2.0)).item()
    assert contrastive_loss(logits, kind).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_pairs(kind):
    embeds = torch.ones(3, 2, requires_grad=True)
    none = embeds[torch.zeros(3, dtype=torch.bool)]
    loss = contrastive_loss(none @ none.t(), kind)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, embeds)[0], torch.zeros(3, 2))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_one_text_for_each_image(kind):
    with pytest.raises(ValueError, match="got 2 images and 3 texts"):
        contrastive_loss(torch.zeros(2, 3), kind)


def test_ignored_label_is_the_one_of_transformers():
    assert loss_coca.IGNORE_INDEX == -100
