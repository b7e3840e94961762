"""Which messages travel with eight bits whatever the codec."""

from __future__ import annotations

import pytest
import torch

import compactdist
from compactdist_xdit.fine import FINE, Fine, ends


def call(key: str, step: int = 3) -> compactdist.CallInfo:
    return compactdist.CallInfo(key=key, op="send", dtype=torch.float32, numel=4096, step=step)


@pytest.mark.parametrize(("route", "codec"), [("ring", None), ("ulysses", None), ("cfg", FINE), ("sp", FINE)])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_by_route(route: str, codec: str | None, step: int) -> None:
    assert Fine(route)(call("kv/all_gather#0", step)) == codec


def test_pipefusion() -> None:
    policy = Fine("pipefusion", 3, lambda: ends(1, 8, 1))
    latents, hidden = "latent.0/send/3>0/t0#0", "latent.0/send/0>1/t0#0"
    assert {policy(call(latents, step)) for step in range(7)} == {FINE}
    assert [policy(call(hidden, step)) for step in range(7)] == [None, FINE, None, None, None, None, FINE]


@pytest.mark.parametrize(
    ("keyframes", "timesteps", "whole", "numbers"),
    [
        (1, 28, 1, {1, 26}),  # 27 messages of each patch
        (3, 28, 2, {3, 25}),
        (0, 28, 1, {1, 26}),  # the first message of a stream is a keyframe anyway
        (1, 8, 8, {1, 7}),  # no patches at all
        (1, 4, 9, {1, 3}),
        (1, None, 1, {1}),
    ],
)
def test_first_residual_and_last_message(keyframes: int, timesteps: int | None, whole: int, numbers: set[int]) -> None:
    assert ends(keyframes, timesteps, whole) == numbers
