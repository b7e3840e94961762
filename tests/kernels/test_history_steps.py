"""The fused steps of ``scales="token_history"`` against the reference: the same bytes at both ends, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.kernels import history_steps_for, steps_for, use
from compactdist.kernels.reference.checksum import weighted_sum
from compactdist.kernels.spec import MatrixView
from compactdist.state.matrix_view import Layout, plain
from tests.kernels.test_fused_steps import KINDS, _cast, _special, dtypes_of
from tests.quick import quick_for

pytest.importorskip("numba")

CPU = torch.device("cpu")
VIEWS = (
    plain(2 * 70 * 136, 2, 136),
    plain(1100 * 128, 1, 128),  # every second row is in the sums
    MatrixView(70 * 136 - 5, 1, 70, 136),  # a padded tail
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=5, d=32).resolve(2 * 2 * 5 * 33 * 32),  # no whole runs of 64
)


class Ends:
    """Sender and receiver on some kernels."""

    def __init__(self, kernels: str, codec, view: MatrixView, dtype: torch.dtype) -> None:
        self.kernels = kernels
        self.sender, self.receiver = (codec.open(view, dtype, CPU) for _ in range(2))

    def step(self, x, terms):
        """All that one frame makes."""
        payload = torch.full((self.sender.payload_nbytes,), 255, dtype=torch.uint8)
        out, got = torch.empty_like(x), terms[0].clone() if terms else torch.empty_like(x)
        with use(self.kernels):
            self.sender.encode(x, terms, out, payload)
            self.receiver.decode(payload, (got, *terms[1:]) if terms else (), got)
        for end in (self.sender, self.receiver):
            end.commit()
        if self.sender.checksum is not None:
            assert self.sender.checksum == weighted_sum(payload)
        return payload, out, got, *self.sender.shared_memory, *self.receiver.shared_memory


@pytest.mark.timeout(400)
@pytest.mark.parametrize("codec_id", quick_for(["int4"], ["binary", "int4", "int2", "int8", "ternary", "int3", "fp8"]))
def test_same_bytes_as_the_reference(codec_id):
    codec, dtypes = codecs.get(codec_id, scales="token_history"), (torch.bfloat16, torch.float32, torch.float16)
    for turn, view in enumerate(VIEWS):
        for dtype in dtypes if codec_id == "int4" else dtypes_of(codec_id)[turn % 2 :][:1]:
            both = [Ends(kernels, codec, view, dtype) for kernels in ("reference", "cpu")]
            g = torch.Generator().manual_seed(turn)
            terms = ()
            for kind in ("gaussian", *KINDS, "gaussian"):
                change = _special(kind, view, g)
                x = _cast(change + (terms[0].double() if terms else 0), dtype)
                if not bool(torch.isfinite(x.float() - (sum(t.float() for t in terms) if terms else 0)).all()):
                    continue
                expected, got = (ends.step(x, terms) for ends in both)
                for one, other in zip(expected, got, strict=True):
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (view, dtype, kind)
                base = _cast(torch.randn(view.numel, generator=g), dtype)
                terms = ((base,), (base, _cast(base.float() / 8, dtype)), ())[len(terms)]


@pytest.mark.slow
def test_ordinary_values_are_not_left_to_the_reference():
    """Steps that declined everything would pass the other test."""
    for codec_id in ("binary", "int2", "int4", "int8"):
        codec, view = codecs.get(codec_id, scales="token_history"), VIEWS[0]
        assert codec.spec is not None
        with use("cpu"):
            steps = history_steps_for(codec.spec, view, torch.bfloat16, CPU)
            assert steps_for(codec.spec, view, torch.bfloat16, CPU) is None
        x, base, out = (torch.randn(view.numel).bfloat16() for _ in range(3))
        payload = torch.empty(codec.payload_nbytes(view.shape, x.dtype), dtype=torch.uint8)
        c, after = torch.full((2, 136), 0.5), torch.zeros(2, 136)
        assert steps.encode(x, (base,), out, payload, (c, after))
        assert bool((after > 0).all())
        assert steps.decode(payload, (base,), base, (c, after.zero_()))
        assert bool((after > 0).all())
        assert not steps.encode(x.index_fill(0, torch.tensor(3), torch.nan), (base,), out, payload, (c, after))
    with use("reference"):
        assert history_steps_for(codec.spec, view, torch.bfloat16, CPU) is None
