"""Products of a residual's matrices with thin matrices, scaled, and in bfloat16 where that is much faster.

Only encoders use this module, so it may use matrix products, whose bits differ between machines.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compactdist.codecs.scalar.quantized import finite_amax
from compactdist.errors import CodecConfigError
from compactdist.kernels import cpu_runs
from compactdist.kernels import reference as kernels
from compactdist.kernels.spec import MatrixView

MIN_ELEMENTS_FOR_BF16 = 1 << 18
"""Smaller matrices are multiplied in float32: calls cost more than products."""

_BF16_ROUNDING = 2.0**-9
_scratch = threading.local()


@cache
def _multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are much faster than those of float32 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def _bf16_memory(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Memory for bfloat16 matrices; on a CPU each thread keeps its own, for fresh pages cost more than the work."""
    count = shape[0] * shape[1] * shape[2]
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < count:
        with torch.inference_mode(False):
            held = _scratch.held = torch.empty(count, dtype=torch.bfloat16, device="cpu")
    return held[:count].view(shape)


@dataclass(frozen=True, eq=False)
class Products:
    """Products of one matrix, times a power of two, with thin matrices.

    Where the matrix is bfloat16, operands and products are rounded to bfloat16, and sums are float32.

    Attributes:
        a: float32 or bfloat16 ``(R, C)``, finite. A bfloat16 matrix on a CPU lies in the thread's scratch memory and is
            valid until that is used again.
        factor: The power of two, ``()``.
        norm: Frobenius norm of ``a * factor``, ``()``; before any rounding.
        weights: float32 ``(R,)``: the rows of the matrix are multiplied by them first; ``None`` for ones.
    """

    a: Tensor
    factor: Tensor
    norm: Tensor
    weights: Tensor | None = None

    @property
    def noise(self) -> float:
        """Energy that rounding adds, roughly, relative to that of the strongest direction."""
        return 2.0**-16 if self.a.dtype == torch.bfloat16 else 1e-7

    def with_rows(self, rows: Tensor) -> Tensor:
        """``(p, C)`` to ``(p, R)``: the inner product of every row of the matrix and every one of ``rows``."""
        seen = (self.a @ rows.to(self.a.dtype).T).T.to(torch.float32, memory_format=torch.contiguous_format)
        return seen * self.factor if self.weights is None else (seen * self.weights) * self.factor

    def with_columns(self, rows: Tensor) -> Tensor:
        """``(p, R)`` to ``(p, C)``: the inner product of every column of the matrix and every one of ``rows``."""
        if self.weights is not None:
            rows = rows * self.weights
        # Scaling by a power of two commutes with rounding, and the rows are fewer than the products.
        return ((rows * self.factor).to(self.a.dtype) @ self.a).float()

    def doubt(self, u: Tensor, v: Tensor, v_gram: Tensor, energy: Tensor, products: Tensor) -> Tensor:
        """Bound on the error that bfloat16 rounding leaves in ``(v * with_columns(u)).sum()``.

        Three roundings: the matrix (by Cauchy and Schwarz ``2**-9 |A| |U V|``), ``u`` (``|A| |dU V|``) and the
        products themselves (``2**-9 |V| |products|``). ``v_gram`` is ``v @ v.T`` and ``energy`` is ``|U V|^2``.
        """
        if self.a.dtype != torch.bfloat16:
            return u.new_zeros(())
        du = u - u.bfloat16().float()
        lost = ((du @ du.T) * v_gram).sum().clamp(min=0).sqrt()
        rounding = v_gram.trace().sqrt() * torch.linalg.vector_norm(products)
        doubt: Tensor = self.norm * (_BF16_ROUNDING * energy.sqrt() + lost) + _BF16_ROUNDING * rounding
        return doubt


def of_matrices(values: Tensor, elements: int) -> tuple[list[Products], Tensor]:
    """Products of each group of float32 ``(G, R, C)`` times a power of two that brings its mean square near 1.

    Args:
        values: The matrices.
        elements: Number of elements of the original tensor, for the error message.

    Returns:
        The products, and the powers of two ``(G,)``.

    Raises:
        NonFiniteError: Some element is NaN or infinite.
    """
    groups, rows, channels = values.shape
    norm = torch.stack([torch.linalg.vector_norm(group) for group in values])
    scale = norm * (rows * channels) ** -0.5
    usual = _usual(scale)
    near = torch.ones_like(scale)
    if not bool(usual.all()):
        # Groups that are all zero, or whose squares leave float32: scale each by its largest value first.
        largest = finite_amax(values.abs(), elements)
        near = torch.where(usual, near, kernels.power_of_two_near_inverse(largest).view(-1))
        values = values * near.view(-1, 1, 1)
        norm = torch.stack([torch.linalg.vector_norm(group) for group in values])
        scale = norm * (rows * channels) ** -0.5
    if rows * channels >= MIN_ELEMENTS_FOR_BF16 and _multiplies_bf16(values.device):
        values = _bf16_memory((groups, rows, channels), values.device).copy_(values)
    # Scaling the products by a power of two gives the same bits as scaling the matrix.
    factor = kernels.power_of_two_near_inverse(scale)
    return [Products(values[g], factor[g], norm[g] * factor[g]) for g in range(groups)], factor * near


def of_residual(x: Tensor, terms: tuple[Tensor, ...], view: MatrixView) -> tuple[list[Products], Tensor] | None:
    """As ``of_matrices`` of ``x`` less the sum of ``terms``, in one pass; ``None`` where no kernel can do that."""
    groups, rows, channels = view.shape
    if rows * channels < MIN_ELEMENTS_FOR_BF16 or x.device.type != "cpu" or not _multiplies_bf16(x.device):
        return None
    if not cpu_runs(view.numel):
        return None
    from compactdist.kernels.cpu import products as cpu_lowrank

    if not cpu_lowrank.supports(x, *terms):
        return None
    values = _bf16_memory(view.shape, x.device)
    norm = cpu_lowrank.take_in(x, terms, view, values)
    scale = norm * (rows * channels) ** -0.5
    if not bool(_usual(scale).all()):
        return None
    factor = kernels.power_of_two_near_inverse(scale)
    return [Products(values[g], factor[g], norm[g] * factor[g]) for g in range(groups)], factor


def check_weights(
    codec_id: str, weights: Tensor | None, shape: tuple[int, int, int], device: torch.device
) -> Tensor | None:
    """Weights of rows as float32 ``(G, R)``, of mean square 1 in each group.

    Raises:
        CodecConfigError: Weights of another shape, or not all positive, finite and within a factor of 2**20.
    """
    if weights is None:
        return None
    groups, rows, _ = shape
    if not isinstance(weights, Tensor) or tuple(weights.shape) not in ((rows,), (groups, rows)):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise CodecConfigError(
            f"codec {codec_id!r}: row_weights must be a tensor of shape ({rows},) or ({groups}, {rows}), one weight "
            f"for each row of the matrices that are coded, got {got}"
        )
    exact = weights.detach().to(device, torch.float64).expand(groups, rows)
    low, high = float(exact.amin()), float(exact.amax())
    if not (low > 0 and high <= low * 2.0**20):  # false for NaN too
        raise CodecConfigError(
            f"codec {codec_id!r}: row_weights must be positive, finite and within a factor of 2**20 of one another, "
            f"got {low} to {high}; give rows that hardly matter a small positive weight"
        )
    return (exact / exact.square().mean(1, keepdim=True).sqrt()).float()


def _usual(scale: Tensor) -> Tensor:
    return (scale > 2.0**-40) & (scale < 2.0**40)
