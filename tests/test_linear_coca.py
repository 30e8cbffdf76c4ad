"""oneDNN's products equal PyTorch's, forward and backward, and everything that is no plain float32 layer is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_coca import linear_coca
from modeling_coca.linear_coca import CocaLinear, linear

pytestmark = pytest.mark.skipif(not linear_coca._HAS_ONEDNN, reason="PyTorch without MKL or oneDNN: nothing to choose")
ROWS, INPUTS, OUTPUTS = 24, 96, 160


@pytest.fixture
def calls(monkeypatch):
    """Counts the products that oneDNN makes."""
    counted, onednn = [], linear_coca._onednn

    def count(*args):
        counted.append([None if arg is None else tuple(arg.shape) for arg in args])
        return onednn(*args)

    monkeypatch.setattr(linear_coca, "_onednn", count)
    return counted


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> CocaLinear:
    torch.manual_seed(0)
    return CocaLinear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, INPUTS), (2, 3, 4, INPUTS)], ids=["2d", "4d"])
def test_values_and_gradients(shape, bias, calls):
    ours = layer(bias)
    x = torch.randn(shape, requires_grad=True)
    inputs = (x, *ours.parameters())
    expected = F.linear(x, ours.weight, ours.bias)
    outputs = ours(x)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(outputs, inputs, grad), torch.autograd.grad(expected, inputs, grad), rtol=1e-5, atol=1e-5
    )
    assert len(calls) == 3  # forward, input and weight


def test_no_work_for_gradients_that_nobody_takes(calls):
    frozen = layer().requires_grad_(False)
    frozen(torch.randn(ROWS, INPUTS, requires_grad=True)).sum().backward()
    assert len(calls) == 2
    calls.clear()
    layer()(torch.randn(ROWS, INPUTS)).sum().backward()
    assert len(calls) == 2
    calls.clear()
    frozen(torch.randn(ROWS, INPUTS))
    assert len(calls) == 1


def test_strided_and_expanded_inputs(calls):
    ours = layer()
    with torch.no_grad():
        for x in (
            torch.randn(INPUTS, ROWS).t(),
            torch.randn(1, INPUTS).expand(ROWS, -1),
            torch.randn(ROWS, 3, INPUTS)[:, 1],
        ):
            torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            linear(x, ours.weight.t().contiguous().t()), F.linear(x, ours.weight), rtol=1e-5, atol=1e-5
        )
    assert len(calls) == 4
    outputs = ours(x)
    (plain,) = torch.autograd.grad(F.linear(x, ours.weight, ours.bias).sum(), ours.weight)
    (grad,) = torch.autograd.grad(outputs.sum(), ours.weight)  # the gradient comes as an expanded scalar
    torch.testing.assert_close(grad, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["small", "float64", "bfloat16", "autocast", "meta", "subclass", "empty"])
def test_everything_else_is_left_alone(case, calls):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    ours, x = layer(dtype=dtype), torch.randn(ROWS, INPUTS, dtype=dtype)
    if case == "small":
        x = x[:2]
    elif case == "empty":
        x = x[:0]
    elif case == "meta":
        ours, x = ours.to("meta"), x.to("meta")
    elif case == "subclass":  # as quantised and sharded weights are
        ours.weight = nn.Parameter(
            torch.Tensor._make_subclass(type("Quantized", (torch.Tensor,), {}), ours.weight.data)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        outputs = ours(x)
        expected = F.linear(x, ours.weight, ours.bias)
    assert not calls
    assert outputs.dtype == (torch.bfloat16 if case == "autocast" else dtype)
    if case != "meta":
        assert torch.equal(outputs, expected)


def test_compiled_and_exported_layers_are_plain(calls):
    ours, x = layer(), torch.randn(ROWS, INPUTS)
    exported = torch.export.export(ours, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), ours(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def test_a_packed_layer_follows_its_weights(calls):
    ours, x = layer(), torch.randn(ROWS, INPUTS)
    ours.pack()

    def check():
        with torch.no_grad():
            torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)

    check()
    packed = ours._packed
    ours.pack()
    assert packed is not None and ours._packed is packed  # weights that have not changed are not packed again
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    ours(x).square().sum().backward()  # training takes the weights themselves
    optimizer.step()
    check()
    ours.load_state_dict(layer().state_dict(), assign=True)
    check()
    ours.weight = nn.Parameter(torch.randn(OUTPUTS, INPUTS))
    check()
    assert ours.double()(x.double()).dtype == torch.float64
    ours.float()
    check()
    assert list(ours.state_dict()) == ["weight", "bias"]


def test_a_packed_layer_takes_weights_that_stand_in(calls):
    ours, x = layer(), torch.randn(ROWS, INPUTS)
    ours.pack()
    with torch.no_grad():
        for _ in range(3):  # one after the other at the same address
            others = {"weight": torch.randn(OUTPUTS, INPUTS), "bias": torch.randn(OUTPUTS)}
            found = torch.func.functional_call(ours, others, (x,))
            torch.testing.assert_close(found, F.linear(x, **others), rtol=1e-5, atol=1e-5)
            del others
        for _ in range(3):
            ours.weight = nn.Parameter(torch.randn(OUTPUTS, INPUTS))
            torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)


def test_weights_made_in_inference_mode(calls):
    with torch.inference_mode():
        ours, x = layer(), torch.randn(ROWS, INPUTS)
        ours.pack()
        torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)


def test_a_packed_layer_can_be_copied(calls):
    ours, x = layer(), torch.randn(ROWS, INPUTS)
    ours.pack()
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.weight.mul_(2)
        torch.testing.assert_close(twin(x), F.linear(x, twin.weight, twin.bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)
