"""What the tests of histories in eight bits share: a step with such a term is the step with what it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactdist import codecs
from compactdist.kernels import use
from compactdist.kernels.reference import terms as terms_of
from compactdist.kernels.spec import EightBits, MatrixView
from compactdist.state.matrix_view import Layout, blocks, plain
from compactdist.state.quantized_history import quantize

FORMS: tuple[EightBits, ...] = ("int8", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODECS: tuple[dict[str, Any], ...] = (
    *({"id": codec_id} for codec_id in ("binary", "ternary", "int2", "int3", "int4", "int8", "fp8")),
    *({"id": codec_id, "scales": "block"} for codec_id in ("binary", "int2", "int8")),
    *({"id": codec_id, "scales": "token_history"} for codec_id in ("binary", "int4", "int8")),
)
VIEWS = (
    plain(70 * 264, 1, 264),
    plain(3 * 65 * 65, 3, 65),  # runs of 64 elements begin anywhere in a block of 128
    blocks(300),
    blocks(128 * 6 + 8),
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=3, d=32).resolve(2 * 2 * 3 * 5 * 32),
    Layout("(h s d) -> 1 s (d h)", h=3, d=24).resolve(3 * 7 * 24),
)


def name_of(codec: dict[str, Any]) -> str:
    """What pytest calls a codec."""
    return "-".join(codec.values())


def tensor(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Magnitudes over some powers of two, and blocks of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=g) * torch.exp2(3 * torch.randn(numel, generator=g))
    x[numel // 3 : numel // 2] = 0
    return x.clamp(-1e3, 1e3).to(dtype)


def steps(
    codec: dict[str, Any], view: MatrixView, dtype: torch.dtype, form: EightBits, kernels: Any, device: torch.device
) -> list[list[Tensor]]:
    """Payload, reconstruction and copies of both ends at three steps, on the CPU.

    ``kernels``: ``"restored"``: by the reference, with the term as a tensor.
    """
    made = []
    with use("reference" if kernels == "restored" else kernels):
        ends = [codecs.get(codec).open(view, dtype, device) for _ in range(2)]
        base = tensor(view.numel, dtype, 0).to(device)
        payload = torch.empty(ends[0].payload_nbytes, dtype=torch.uint8, device=device)
        for step in range(1, 4):
            x = (base.float() + 0.2 * tensor(view.numel, torch.float32, step).to(device)).to(dtype)
            rounded = quantize(base, form, dtype)
            term: Any = terms_of.restored(rounded) if kernels == "restored" else rounded
            outs = torch.full((4, view.numel), torch.nan, dtype=dtype, device=device)
            if step % 2:
                ends[0].encode_twice(x, (term,), outs[0], outs[1], payload)
                ends[1].decode_twice(payload, (term,), outs[2], outs[3])
            else:
                ends[0].encode(x, (term,), outs[0], payload)
                ends[1].decode(payload, (term,), outs[2])
                outs[1], outs[3] = outs[0], outs[2]
            for end in ends:
                end.commit()
            made.append([one.view(torch.uint8).cpu().clone() for one in (payload, *outs)])
            base = outs[2].clone()
    return made


def check(
    codec: dict[str, Any], view: MatrixView, dtype: torch.dtype, form: EightBits, kernels: Any, device: torch.device
) -> None:
    """The bytes are those of the reference with a tensor; both ends and their copies hold the same."""
    expected = steps(codec, view, dtype, form, "restored", torch.device("cpu"))
    for one, other in zip(steps(codec, view, dtype, form, kernels, device), expected, strict=True):
        assert all(torch.equal(one[1], copy) for copy in one[2:])
        assert all(map(torch.equal, one, other))
