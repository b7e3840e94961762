"""Which messages the adapter sends with eight bits, whatever the codec, where the caller has no policy.

* What feeds the scheduler or the model's input: routes `cfg` and `sp`, and the latents from PipeFusion's last stage to
  the first. They are small, and no attention averages their errors out.
* PipeFusion's first residual and its last message of every stream. Stages hand each other the residual stream itself;
  it moves most in the first step and in the last one, and nothing comes after the last to repair it.
"""

from __future__ import annotations

from collections.abc import Callable

import compactdist

FINE = "int8"


class Fine:
    """A policy for `compactdist.wrap`.

    Args:
        route: of the group.
        last_stage: on `pipefusion`, the rank whose messages to the first stage are latents.
        ends: on `pipefusion`, gives the numbers of messages within their streams that are first residuals or last. They
            are read at every call and must be the same on all stages.
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
    """Numbers, within PipeFusion's streams, of the first residual and of the last message of a request.

    Args:
        keyframes: messages of a stream that are not residuals; the first one never is.
        timesteps: of the request; `None`: the last message is not known.
        whole: steps at the beginning before patches go their own ways; then streams of their own begin.
    """
    first = max(1, keyframes)
    if timesteps is None:
        return frozenset({first})
    return frozenset({first, (timesteps - whole if timesteps > whole else timesteps) - 1})
