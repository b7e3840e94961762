"""The messages that the adapter sends with eight bits, whatever the codec, unless the caller has a policy.

* Messages that feed the scheduler or the model's input: those on routes `cfg` and `sp`, and the latents that
  PipeFusion's last stage sends to the first. They are small, and no attention averages their errors out.
* The first residual and the last message of every PipeFusion stream. Stages send each other the hidden states of the
  model. These change most in the first and in the last step, and no later message repairs an error of the last.
"""

from __future__ import annotations

from collections.abc import Callable

import compactdist

FINE = "int8"


class Fine:
    """A policy for `compactdist.wrap`: `FINE` for the messages above, the group's codec for all others.

    Args:
        route: of the group.
        last_stage: on `pipefusion`, the rank whose messages to the first stage are latents.
        ends: on `pipefusion`, returns the numbers, within its stream, of the first residual and of the last message. It
            is called for every message and must return the same numbers on all stages.
    """

    def __init__(
        self, route: str, last_stage: int | None = None, ends: Callable[[], frozenset[int]] = frozenset
    ) -> None:
        self._always = route in ("cfg", "sp")
        self._latents = None if last_stage is None else f"/send/{last_stage}>0/"
        self._ends = ends

    def __call__(self, call: compactdist.CallInfo) -> str | None:
        if self._always or (self._latents is not None and self._latents in call.key) or call.step in self._ends():
            return FINE
        return None


def ends(keyframes: int, timesteps: int | None, whole: int) -> frozenset[int]:
    """The numbers, within PipeFusion's streams, of the first residual and of the last message of a request.

    Args:
        keyframes: messages at the beginning of a stream that are keyframes; the first message always is one.
        timesteps: of the request; `None` where the number, and so the last message, is not known.
        whole: PipeFusion's synchronous steps at the beginning. After them every patch begins a stream of its own.
    """
    first = max(1, keyframes)
    if timesteps is None:
        return frozenset({first})
    return frozenset({first, (timesteps - whole if timesteps > whole else timesteps) - 1})
