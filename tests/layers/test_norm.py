"""Norms of half precision whose weights lie around zero: the one is added in fp32."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_helix.exchange.scores import SegmentNorm
from megatron_helix.layers.norm import input_norm
from megatron_helix.partition.layout import HelixLayout
from tests.distributed import run_distributed

WIDTH, STD = 64, 0.003  # of a weight: less than half of what 1 can be told from in bfloat16
NORMS = {"RMSNorm": torch.nn.functional.rms_norm, "LayerNorm": torch.nn.functional.layer_norm}


def _drawn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _fused_linear(normalization: str, dtype: torch.dtype, *, around_zero: bool) -> Any:
    """What a linear of TransformerEngine with a norm in front of it says of the norm."""
    weight = STD * _drawn(1, WIDTH, dtype=torch.float32) + (not around_zero)
    bias = _drawn(2, WIDTH, dtype=dtype) if normalization == "LayerNorm" else None
    return SimpleNamespace(
        normalization=normalization,
        zero_centered_gamma=around_zero,
        layer_norm_weight=torch.nn.Parameter(weight.to(dtype)),
        layer_norm_bias=None if bias is None else torch.nn.Parameter(bias),
        eps=1e-5,
    )


def _exact(linear: Any, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of input and weight, in double precision."""
    x = x.detach().double().requires_grad_()
    weight = linear.layer_norm_weight.detach().double().requires_grad_()
    bias = () if linear.layer_norm_bias is None else (linear.layer_norm_bias.detach().double(),)
    norm = NORMS[linear.normalization]
    y = norm(x, (WIDTH,), weight + linear.zero_centered_gamma, *bias, eps=linear.eps)
    y.backward(grad.double())
    return [y.detach(), x.grad, weight.grad]  # type: ignore[list-item]


# Around one the norm is torch's, whose LayerNorm on a CPU adds up weights' gradients in halves.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("normalization", "around_zero"),
    [("RMSNorm", False), ("RMSNorm", True), ("LayerNorm", True)],
)
def test_the_norm_before_a_linear_is_rounded_once(
    normalization: str, dtype: torch.dtype, around_zero: bool
) -> None:
    linear = _fused_linear(normalization, dtype, around_zero=around_zero)
    x = _drawn(3, 128, WIDTH, dtype=dtype).requires_grad_()
    grad = _drawn(4, 128, WIDTH, dtype=dtype)
    y = input_norm(linear)(x)
    y.backward(grad)
    exact = _exact(linear, x, grad)
    for found, expected in zip((y, x.grad, linear.layer_norm_weight.grad), exact, strict=True):
        assert found is not None
        assert found.dtype == dtype
        off = (found.double() - expected).abs()
        # Half of the last place, and a few of fp32's of what cancels on the way.
        allowed = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-5 * expected.abs().max()
        assert (off <= allowed).all()


def test_a_linear_without_a_norm_gets_its_input() -> None:
    x = torch.ones(2, 3)
    assert input_norm(SimpleNamespace(layer_norm_weight=None))(x) is x
    assert input_norm(SimpleNamespace())(x) is x


@pytest.mark.parametrize("m", [2, 3])  # of 64 channels three segments are not alike
@pytest.mark.parametrize("around_zero", [False, True], ids=["around_one", "around_zero"])
@pytest.mark.parametrize("normalization", NORMS)
def test_the_norm_over_segments_is_rounded_once(
    normalization: str, around_zero: bool, m: int
) -> None:
    layout = HelixLayout(m=m, n=1, num_attention_heads=2, num_query_groups=2, kv_channels=WIDTH)
    linear = _fused_linear(normalization, torch.bfloat16, around_zero=around_zero)
    x = _drawn(3, 128, WIDTH, dtype=torch.bfloat16)
    exact, _, _ = _exact(linear, x, torch.zeros(128, WIDTH))

    def normalized() -> torch.Tensor:
        stock = SimpleNamespace(weight=linear.layer_norm_weight, bias=linear.layer_norm_bias)
        groups: Any = SimpleNamespace(dim=dist.group.WORLD, segment=dist.get_rank())
        norm = SegmentNorm(
            stock,  # type: ignore[arg-type]
            centered=normalization == "LayerNorm",
            eps=linear.eps,
            zero_centered_gamma=around_zero,
            layout=layout,
            groups=groups,
        )
        return norm(x[:, layout.segment_channels(dist.get_rank())]).detach()

    for segment, found in enumerate(run_distributed(normalized, m)):
        expected = exact[:, layout.segment_channels(segment)]
        off = (found.double() - expected).abs()
        allowed = expected.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-5
        assert (off <= allowed).all()
