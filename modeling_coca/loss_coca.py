"""The two losses of CoCa: contrastive on whole images and texts, captioning on tokens.

Given a process group, each is the loss of the joined batch of all its processes: the mean over the processes, of the
value and of the parameters' gradients (which DDP, FSDP and ZeRO take), is what one process gets from all rows at once.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .linear_coca import CocaLinear, linear

IGNORE_INDEX = -100
CHUNK_SIZE = 1024
_WORDS = 2048  # whose gradients are added at a time


class _LinearCrossEntropy(torch.autograd.Function):
    """
    The sum of a cross-entropy of `hidden @ weight.T` and `labels`, holding `rows x len(weight)` logits at a time: over the
    softmax of each row, or (`sigmoid`) over each logit on its own, of which the row's label is the positive one.

    The gradients are formed together with the loss, while a chunk's logits are there (as in Liger, arXiv 2410.10989), so
    that nothing is computed twice and nothing of size `len(hidden) x len(weight)` outlives a chunk. Of the size of `weight`
    there is its gradient alone.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, sigmoid, grad_enabled):
        # `needs_input_grad` is also true under `no_grad`, where evaluation would pay for gradients that nobody takes
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        # At least once: without tokens, too, there are gradients (of 0)
        for start in range(0, max(hidden.shape[0], 1), rows):
            part = slice(start, start + rows)
            logits = grad_logits = None  # of the chunk before
            logits = linear(hidden[part], weight).to(dtype)  # [rows, V]
            log_normalizer = F.softplus(logits).sum(dim=-1) if sigmoid else torch.logsumexp(logits, dim=-1)
            target = labels[part, None]
            loss += (log_normalizer - logits.gather(1, target)[:, 0]).sum()
            if not (need_hidden or need_weight):
                continue
            grad_logits = logits.sigmoid_() if sigmoid else logits.sub_(log_normalizer[:, None]).exp_()
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits = grad_logits.to(hidden.dtype)
            if need_hidden:
                grad_hidden[part] = linear(grad_logits, weight.to(hidden.dtype).t())
            if need_weight:
                if grad_weight is None:
                    # Summed in fp32 or better: bf16 weights would lose small contributions of the later chunks
                    grad_weight = torch.zeros_like(weight, dtype=dtype)
                _add_product(grad_weight, grad_logits.t(), hidden[part].t())
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            # A copy only for who asked to come back (`retain_graph=True`)
            grad_weight = grad_weight * grad_loss if _is_graph_kept() else grad_weight.mul_(grad_loss)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *(None,) * 4


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right.T`, some rows at a time: their product stays in the processor's cache, and takes no room."""
    for rows, left_rows in zip(total.split(_WORDS), left.split(_WORDS), strict=True):
        rows += linear(left_rows, right)


def _is_graph_kept() -> bool:
    """Whether the backward pass that runs leaves what was saved for another one."""
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return is_kept is None or torch.compiler.is_compiling() or is_kept()


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int = CHUNK_SIZE
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
    return _LinearCrossEntropy.apply(
        hidden, weight.to(hidden.dtype), labels, chunk_size, False, torch.is_grad_enabled()
    )


def caption_loss(
    hidden_states: torch.Tensor,
    lm_head: torch.nn.Module,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> torch.Tensor:
    """
    Captioning loss: the mean cross-entropy of each next token, over the tokens that have a label.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, width)`): the decoder's last hidden states.
        lm_head (`torch.nn.Module`): the output layer. The logits of at most 1,024 tokens are in memory at a time.
        labels (`torch.LongTensor` of shape `(batch, length)`): -100 where there is no loss. The token at position `t` is
            predicted from the states before it: the shift happens here.
        shift_labels (`torch.LongTensor`, *optional*): labels that are shifted already, instead of `labels`.
        num_items_in_batch (`int`, *optional*): divisor instead of the number of labels.
        group (`torch.distributed.ProcessGroup`, *optional*): processes whose labels are counted, by default this one.

    Returns:
        `torch.Tensor`: scalar; 0 (with gradients of 0) where no token has a label.
    """
    if shift_labels is None:
        shift_labels = shift(labels)
    labelled = shift_labels != IGNORE_INDEX
    hidden, targets = hidden_states[labelled], shift_labels[labelled].to(hidden_states.device)
    # A weight that is sharded, adapted or offloaded is whole only in the layer's own forward
    is_plain = type(lm_head) in (torch.nn.Linear, CocaLinear) and type(lm_head.weight) is torch.nn.Parameter
    if is_plain and lm_head.bias is None and not lm_head.weight.is_meta:
        total = linear_cross_entropy(hidden, lm_head.weight, targets)
    else:
        total = _cross_entropy_in_chunks(hidden, lm_head, targets)
    if num_items_in_batch is None:
        num_items_in_batch = mean_count(labelled.sum(), group)
    return total / num_items_in_batch


def shift(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) of the next token of each position."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def mean_count(count: torch.Tensor, group: "dist.ProcessGroup | None") -> torch.Tensor:
    """What a process divides its sum by, so that the mean over processes is the mean over all that they count."""
    if group is None:
        return count.clamp(min=1)
    total = count.detach().clone()
    dist.all_reduce(total, group=group)
    return total.clamp(min=1) / dist.get_world_size(group)


def _cross_entropy_in_chunks(hidden: torch.Tensor, lm_head: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """For any output layer: the logits of a chunk are computed again in the backward pass."""

    def chunk_loss(hidden, labels):
        logits = lm_head(hidden)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")

    if len(hidden) <= CHUNK_SIZE:
        return chunk_loss(hidden, labels)
    chunks = zip(hidden.split(CHUNK_SIZE), labels.split(CHUNK_SIZE), strict=True)
    return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def data_group(model: torch.nn.Module) -> "dist.ProcessGroup | None":
    """The processes that hold batches of their own for a model, this one among them. `None`: it is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    mesh_manager = getattr(model, "_mesh_manager", None)  # of `from_pretrained(distributed_config=...)`
    if mesh_manager is None:
        group = dist.group.WORLD
    else:  # tensor-parallel processes share a batch
        group = mesh_manager.get_mesh(("dp_replicate", "fsdp"))._flatten().get_group()
    return group if dist.get_world_size(group) > 1 else None


class _Gather(torch.autograd.Function):
    """(n, D) of each process -> (processes, n, D) on each; every process gets the gradients that all have for its rows."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        grad_tensor = torch.empty_like(grad[0])
        # Its older name where it has no other; `reduce_scatter` is what gloo lacks in PyTorch 2.6
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(grad_tensor, grad.flatten(0, 1), group=ctx.group)
        return grad_tensor, None


def gather_pairs(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, group: "dist.ProcessGroup"
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """
    The pairs of all processes, with gradients. Processes may hold different numbers of pairs, or none.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(pairs, width)`): of this process.
        group (`torch.distributed.ProcessGroup`): the processes.

    Returns:
        images and texts `(all pairs, width)`, ordered by process, and the place of this process's first pair in them.
    """
    counts = [torch.zeros(1, dtype=torch.long, device=image_embeds.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.full_like(counts[0], len(image_embeds)), group=group)
    counts = torch.cat(counts).tolist()
    # One collective for both, whose order in the backward pass is then the same everywhere
    pairs = torch.cat([image_embeds, text_embeds], dim=-1)
    gathered = _Gather.apply(F.pad(pairs, (0, 0, 0, max(counts) - len(pairs))), group)
    if min(counts) == max(counts):
        gathered = gathered.flatten(0, 1)
    else:
        gathered = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
    all_images, all_texts = gathered.chunk(2, dim=-1)
    return all_images, all_texts, sum(counts[: dist.get_rank(group)])


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
    kind: str = "softmax",
    group: "dist.ProcessGroup | None" = None,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """
    Contrastive loss of a batch of matching pairs. The logits in memory are those of `chunk_size` rows of this process with
    all pairs; they are computed in fp32.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(batch, width)`):
            L2-normalised, image `i` belonging to text `i`.
        logit_scale (`torch.Tensor`): logarithm of the factor on the similarities.
        logit_bias (`torch.Tensor`, *optional*): what is added to them.
        kind (`str`): `"softmax"`: the mean of the cross-entropies of images over texts and of texts over images (CLIP,
            arXiv 2103.00020); `"sigmoid"`: each pair on its own, summed over the texts of an image (SigLIP, arXiv 2303.15343).
        group (`torch.distributed.ProcessGroup`, *optional*):
            Processes whose pairs are joined to one batch. They must call this together.
        chunk_size (`int`, defaults to 1024): rows of logits in memory at a time.

    Returns:
        `torch.Tensor`: scalar, fp32; 0 where there are no pairs.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca.loss_coca import contrastive_loss

    >>> embeds = torch.eye(4)
    >>> contrastive_loss(embeds, embeds, logit_scale=torch.tensor(10.0).log()) < 0.001
    tensor(True)
    ```
    """
    if len(image_embeds) != len(text_embeds):
        raise ValueError(
            f"The contrastive loss needs one text for each image, got {len(image_embeds)} images and {len(text_embeds)} "
            "texts."
        )
    device = image_embeds.device
    with torch.autocast(device.type, enabled=False):
        dtype = torch.promote_types(image_embeds.dtype, torch.float32)
        images, texts = image_embeds.to(dtype), text_embeds.to(device, dtype)
        if group is None:
            all_images, all_texts, first = images, texts, 0
        else:
            all_images, all_texts, first = gather_pairs(images, texts, group)
        labels = torch.arange(first, first + len(images), device=device)

        def cross_entropy(rows, columns):
            rows = logit_scale.to(dtype).exp() * rows
            if logit_bias is not None:  # as one more channel
                rows = torch.cat([rows, logit_bias.to(dtype).expand(len(rows), 1)], dim=-1)
                columns = F.pad(columns, (0, 1), value=1.0)
            sigmoid = kind == "sigmoid"
            return _LinearCrossEntropy.apply(rows, columns, labels, chunk_size, sigmoid, torch.is_grad_enabled())

        total = cross_entropy(images, all_texts)
        if kind == "softmax":
            total = (total + cross_entropy(texts, all_images)) / 2
        # Rows are counted on all processes, of which this one holds only its own
        processes = 1 if group is None else dist.get_world_size(group)
        return total * processes / max(len(all_images), 1)
