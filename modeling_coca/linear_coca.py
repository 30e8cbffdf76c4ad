"""Linear layers, quick on CPUs.

PyTorch multiplies float32 matrices on x86 by MKL, which on AMD's processors runs at half the speed of oneDNN, and oneDNN
keeps its speed for the few rows of a decoding step, where MKL loses more. PyTorch holds both: float32 goes to oneDNN here, in
training and inference, with results equal up to rounding. Everything else (other devices and types, autocast, compiled,
exported, quantised or sharded layers) is `nn.Linear` as ever.
"""

import torch
import torch.nn.functional as F
from torch import nn

# The operators behind torch.compile's CPU kernels. MKL is there on x86 only
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
_FEWEST_MULTIPLICATIONS = 2**18  # below, oneDNN's dozen microseconds a call cost more than they save


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return _onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _onednn(grad.contiguous(), weight.t()) if ctx.needs_input_grad[0] else None,
            _onednn(rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`: `x @ weight.T + bias`, (..., K), (N, K), (N,) -> (..., N), by oneDNN where that is quicker."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _OneDnnLinear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first, for shapes asked for below become guards
        return False
    return (
        _HAS_ONEDNN
        and type(x) is torch.Tensor
        and type(weight) in (nn.Parameter, torch.Tensor)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _FEWEST_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
    )


class CocaLinear(nn.Linear):
    """`nn.Linear`, see [`linear`]. [`~CocaLinear.pack`] makes it quicker still for inference on a CPU."""

    # In oneDNN's order; the weights that it was made of, kept so that no others come to stand at their address; their version
    _packed: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def pack(self) -> None:
        """Keep a second copy of the weights in the order in which oneDNN reads them. Weights that change are packed anew."""
        weight = self.weight
        if self._packed is not None and self._is_packed():
            return
        is_plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
        if _HAS_ONEDNN and is_plain and not weight.is_inference():  # those have no version
            source = weight.detach()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(source), source, weight._version

    def __getstate__(self) -> dict:
        # oneDNN's layout can be neither copied nor saved: copies are not packed
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def _is_packed(self) -> bool:
        """Whether what is packed are the weights of now."""
        weight, (_, source, version) = self.weight, self._packed
        return weight.data_ptr() == source.data_ptr() and not weight.is_inference() and weight._version == version

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None or torch.is_grad_enabled() or not _is_for_onednn(x, self.weight):
            return linear(x, self.weight, self.bias)
        if not self._is_packed():
            self.pack()
            if not self._is_packed():  # weights that stand in for the layer's own, as in `functional_call`
                return linear(x, self.weight, self.bias)
        return _onednn(x, self._packed[0], self.bias)
