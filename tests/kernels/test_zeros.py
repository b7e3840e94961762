"""Which zero comes out: -0.0 expected, and a scale of zero under codes of both signs."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.kernels import use
from compactdist.kernels.spec import MatrixView
from tests.codecs import kit
from tests.kernels.test_fused_steps import DTYPES, FORMS
from tests.quick import quick_for

pytest.importorskip("numba")
VIEW = MatrixView(70 * 136, 1, 70, 136)


def payloads(codec):
    """Zero scales with codes of all kinds; and what an encoder makes of rows that are nothing beside others."""
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(256, (codec.payload_nbytes(VIEW.shape, torch.float32),), generator=g).to(torch.uint8)
    codes[codec.sections_of(VIEW.shape).codes_nbytes :] = 0
    yield codes
    x = torch.randn(VIEW.numel, generator=g).view(70, 136)
    x[1:60] *= 1e-30
    with use("reference"):
        yield codec.encode(x.view(1, 70, 136))


def expected(dtype):
    """Terms of orders 0, 1 and 2 in which zeros of both signs meet."""
    zeros = torch.zeros(VIEW.numel, dtype=dtype)
    signs = torch.where(torch.arange(VIEW.numel) % 3 > 0, -zeros, zeros)
    return (), (signs,), (-zeros, signs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_kernel_gives_the_same_zero(form):
    codec = codecs.get(form)
    dtype = DTYPES[FORMS.index(form) % len(DTYPES)]
    for payload in payloads(codec):
        for terms in expected(dtype):
            made = {}
            for kernels in ("reference", "cpu"):
                made[kernels] = torch.empty(VIEW.numel, dtype=dtype)
                with use(kernels):
                    kit.decode_residual(codec, payload, terms, VIEW, made[kernels])
            assert torch.equal(kit.as_bytes(made["reference"]), kit.as_bytes(made["cpu"]))
            if not terms:
                assert not made["cpu"].eq(0).logical_and(made["cpu"].signbit()).any(), "-0 out of nothing"


@pytest.mark.parametrize("form", quick_for(FORMS[::2], FORMS), ids=str)
def test_an_encoder_says_what_its_decoder_gives(form):
    codec = codecs.get(form)
    dtype = DTYPES[(1 + FORMS.index(form)) % 2]
    g = torch.Generator().manual_seed(2)
    change = torch.randn(VIEW.numel, generator=g).view(70, 136)
    change[1:60] *= 1e-30
    x = change.view(-1).to(dtype)
    for terms in expected(dtype):
        made = []
        for kernels in ("reference", "cpu"):
            out, held = torch.empty_like(x), torch.empty_like(x)
            with use(kernels):
                payload = kit.encode_residual(codec, x, terms, VIEW, out)
                kit.decode_residual(codec, payload, terms, VIEW, held)
            made += [kit.as_bytes(out), kit.as_bytes(held)]
        assert all(torch.equal(one, made[0]) for one in made[1:])
