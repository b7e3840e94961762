"""The low-rank codecs against linear algebra that shares no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compactdist import codecs
from tests.codecs import kit


def structured(rank: int, noise: float, shape: tuple[int, int] = (200, 150)) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], rank, generator=g), torch.randn(rank, shape[1], generator=g)
    return left @ right / rank**0.5 + noise * torch.randn(shape, generator=g)


def best_nmse(x: torch.Tensor, rank: int) -> float:
    energy = torch.linalg.svdvals(x.double()).square()
    return float(energy[rank:].sum() / energy.sum())


def test_close_to_the_best_of_its_rank():
    for x in (structured(6, 0.1), structured(20, 0.02), kit.sample("gaussian", (200, 150))):
        assert kit.nmse(codecs.get("lowrank"), x) <= 1.1 * best_nmse(x, 8) + 2e-5


def test_low_rank_is_recovered_up_to_rounding():
    x = structured(5, 0.0)
    assert kit.nmse(codecs.get("lowrank"), x) < 1e-5
    assert kit.nmse(codecs.get("lowrank_int4"), x) < 0.03


def test_decoder_adds_components_in_order():
    """Written from the description: factors, gain, float32 sums in ascending order."""
    x = kit.sample("gaussian", (2, 20, 13))
    rank = 3
    payload = codecs.get("lowrank", rank=rank).encode(x).numpy()

    def floats(at: int, count: int) -> np.ndarray:
        return (np.frombuffer(payload.tobytes(), "<u2", count, at).astype("<u4") << 16).view("<f4")

    gain = floats(0, 2)
    u = floats(16, 2 * rank * 20).reshape(2, rank, 20)
    v = floats(16 + 2 * 2 * rank * 20, 2 * rank * 13).reshape(2, rank, 13)
    assert payload.size == 16 + 240 + 160
    y = np.zeros((2, 20, 13), np.float32)
    for k in range(rank):
        term = u[:, k, :, None] * v[:, k, None, :]
        y = term if k == 0 else y + term
    y = np.where(np.abs(y) < 2.0**-30, np.float32(0), y) * gain[:, None, None]
    decoded = codecs.get("lowrank", rank=rank).decode(torch.from_numpy(payload.copy()), x.shape, torch.float32)
    assert torch.equal(decoded, torch.from_numpy(y))


@pytest.mark.parametrize("codec_id", ["lowrank", "lowrank_int4"])
def test_random_numbers_of_others_are_left_alone(codec_id):
    codec = codecs.get(codec_id)
    x = structured(4, 0.1)
    before = torch.get_rng_state()
    payload = codec.encode(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(codec.encode(x), payload)


def test_sizes():
    """At [1088, 3072]: two bytes for each of r (R + C) numbers, or half a byte and two bytes for each component."""
    shape = (1088, 3072)
    assert codecs.get("lowrank").payload_nbytes(shape, torch.float16) == 16 + 2 * 8 * (1088 + 3072)
    assert codecs.get("lowrank_int4").payload_nbytes(shape, torch.float16) == 16 + 32 * (1088 + 3072) // 2 + 2 * 2 * 32
    # the rank is cut to what the matrix has
    assert codecs.get("lowrank").payload_nbytes((3, 50), torch.float16) == 16 + 2 * 3 * 3 + 14 + 2 * 3 * 50 + 4


def test_more_components_are_better():
    x = kit.sample("gaussian", (120, 100))
    for codec_id in ("lowrank", "lowrank_int4"):
        errors = [kit.nmse(codecs.get(codec_id, rank=rank), x) for rank in (1, 4, 16, 64)]
        assert errors == sorted(errors, reverse=True)


def test_an_l_of_large_values_is_reduced():
    x = torch.full((64, 64), 1e-3)
    x[0] = 100.0
    x[:, 0] = -100.0
    assert kit.nmse(codecs.get("lowrank"), x) < 1e-3
    assert kit.nmse(codecs.get("lowrank_int4"), x) < 0.1
