"""The two losses of CoCa: contrastive on whole images and texts, captioning on tokens.

Both average over what this process holds.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy(hidden @ weight.T, labels, reduction="sum")`, holding `rows x vocabulary` logits at a time.

    The gradients are formed together with the loss, while a chunk's logits are there (as in Liger, arXiv 2410.10989), so
    that nothing is computed twice and nothing of size tokens x vocabulary outlives a chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, grad_enabled):
        # `needs_input_grad` is also true under `no_grad`, where evaluation would pay for gradients that nobody takes
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Summed in fp32 or better: bf16 weights would lose small contributions of the later chunks
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight).to(dtype)  # [rows, V]
            log_normalizer = torch.logsumexp(logits, dim=-1)
            target = labels[part, None]
            loss += (log_normalizer - logits.gather(1, target)[:, 0]).sum()
            if not (need_hidden or need_weight):
                continue
            grad_logits = logits.sub_(log_normalizer[:, None]).exp_()  # softmax
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits = grad_logits.to(hidden.dtype)
            if need_hidden:
                grad_hidden[part] = grad_logits @ weight.to(hidden.dtype)
            if need_weight:
                if grad_logits.dtype == dtype:
                    torch.addmm(grad_weight, grad_logits.t(), hidden[part], out=grad_weight)
                else:
                    grad_weight += grad_logits.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int = 1024
) -> torch.Tensor:
    """
    Sum of `cross_entropy(hidden @ weight.T, labels)` without the full logits: exact in the loss and in both gradients.

    Args:
        hidden (`torch.Tensor` of shape `(tokens, width)`): last hidden states of the tokens that have a label.
        weight (`torch.Tensor` of shape `(vocabulary, width)`): weight of the output layer.
        labels (`torch.LongTensor` of shape `(tokens,)`): ids in `[0, vocabulary)`.
        chunk_size (`int`, defaults to 1024): tokens whose logits are in memory at a time.

    Returns:
        `torch.Tensor`: scalar, fp32 (fp64 for fp64 inputs).

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca.loss_coca import linear_cross_entropy

    >>> hidden, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.randint(0, 11, (5,))
    >>> expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    >>> torch.allclose(linear_cross_entropy(hidden, weight, labels, chunk_size=2), expected, atol=1e-5)
    True
    ```
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # A custom function sees its inputs as they are, so that autocast's choice is made here
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _LinearCrossEntropy.apply(hidden, weight.to(hidden.dtype), labels, chunk_size, torch.is_grad_enabled())


def caption_loss(
    hidden_states: torch.Tensor,
    lm_head: torch.nn.Module,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Captioning loss: the mean cross-entropy of each next token, over the tokens that have a label.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, width)`): the decoder's last hidden states.
        lm_head (`torch.nn.Module`): the output layer. A plain `nn.Linear` without bias never makes the logits of the whole
            batch; another module (an adapter around it, say) makes those of the labelled tokens.
        labels (`torch.LongTensor` of shape `(batch, length)`): -100 where there is no loss. The token at position `t` is
            predicted from the states before it: the shift happens here.
        shift_labels (`torch.LongTensor`, *optional*): labels that are shifted already, instead of `labels`.
        num_items_in_batch (`int`, *optional*): divisor instead of the number of labels here.

    Returns:
        `torch.Tensor`: scalar; 0 (with gradients of 0) where no token has a label.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    labelled = shift_labels != IGNORE_INDEX
    hidden, targets = hidden_states[labelled], shift_labels[labelled].to(hidden_states.device)
    if type(lm_head) is torch.nn.Linear and lm_head.bias is None:
        total = linear_cross_entropy(hidden, lm_head.weight, targets)
    else:
        total = F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = max(targets.numel(), 1)
    return total / num_items_in_batch


def contrastive_loss(logits_per_image: torch.Tensor, kind: str = "softmax") -> torch.Tensor:
    """
    Contrastive loss of a batch of matching pairs.

    Args:
        logits_per_image (`torch.Tensor` of shape `(batch, batch)`): scaled similarities, image `i` belonging to text `i`.
        kind (`str`): `"softmax"`: the mean of the cross-entropies of images over texts and of texts over images (CLIP,
            arXiv 2103.00020); `"sigmoid"`: each pair on its own, summed over the texts of an image (SigLIP, arXiv 2303.15343).

    Returns:
        `torch.Tensor`: scalar, fp32; 0 where there are no pairs.
    """
    logits = logits_per_image.float()
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(
            f"The contrastive loss needs one text for each image, got {logits.shape[0]} images and {logits.shape[1]} texts."
        )
    if not len(logits):
        return logits.sum()  # no pairs: 0, and gradients of 0
    if kind == "sigmoid":
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum(dim=-1).mean()
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
