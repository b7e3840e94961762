"""PipeFusion's messages: hidden states and latents between stages.

Stages run ahead of one another and post receives early, so neither a stage's own step clock nor the order of calls
tells both ends the same. What does is the name of a message (`latent`, `encoder_hidden_states`), its patch, and how
many messages of that name and patch came before in the request. That number is the step the wrapped group is told, so
`warmup_steps` counts messages of a stream here, and a patch has a history of its own.

The shape handshakes before the first messages use xfuser's own groups and are never seen here.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

import compactdist


class PipelineMessages:
    """Stands in for the sending and receiving methods of one `PipelineGroupCoordinator`.

    Args:
        coordinator: xfuser's, with groups `device_groups` for two stages and `device_group` for more.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._groups: dict[int | None, Any] = {}
        self._stream = ""
        self._counts: Counter[tuple[str, str]] = Counter()
        self._layout: compactdist.Layout | None = None

    @property
    def last_stage(self) -> int:
        """Rank of the last stage, whose messages to the first are latents."""
        return int(self._coordinator.world_size) - 1

    def use(self, groups: dict[int | None, Any]) -> None:
        """The wrapped groups, by index in `device_groups`, or under `None` the only one."""
        self._groups = groups

    def new_request(self) -> None:
        """Count messages from the first again."""
        self._counts.clear()

    def layout_of(self, info: Any) -> compactdist.Layout | None:
        """Tokens as rows where the message under way has tokens: `(B, S, C)`."""
        return self._layout

    def install(self) -> None:
        """Put the methods in the coordinator's place; class and other instances stay as they are."""
        own, original = vars(self._coordinator), self._coordinator
        own["pipeline_send"] = self._naming_sent(original.pipeline_send)
        own["pipeline_isend"] = self._naming_sent(original.pipeline_isend)
        own["pipeline_recv"] = self._naming_received(original.pipeline_recv)
        own["recv_next"] = self._naming_next(original.recv_next)
        own["_pipeline_isend"] = self._in_stream(original._pipeline_isend, "send")
        own["_pipeline_irecv"] = self._in_stream(original._pipeline_irecv, "recv")

    def remove(self) -> None:
        """Give the coordinator its own methods back."""
        for name in ("pipeline_send", "pipeline_isend", "pipeline_recv", "recv_next"):
            vars(self._coordinator).pop(name, None)
        for name in ("_pipeline_isend", "_pipeline_irecv"):
            vars(self._coordinator).pop(name, None)

    def _name(self, name: str | None, patch: int) -> None:
        # Only latents are cut into patches. Other tensors are sent as segment -1 and received as segment 0.
        name = name or "latent"
        self._stream = f"{name}.{patch}" if name == "latent" and patch >= 0 else name

    def _naming_sent(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def send(tensor: Tensor, name: str = "latent", segment_idx: int = -1) -> None:
            self._name(name, segment_idx)
            original(tensor, name=name, segment_idx=segment_idx)

        return send

    def _naming_received(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def receive(idx: int = -1, name: str = "latent") -> Tensor:
            self._name(name, idx)
            return original(idx=idx, name=name)

        return receive

    def _naming_next(self, original: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(original)
        def receive() -> None:
            if self._coordinator.recv_tasks_queue:
                self._name(*self._coordinator.recv_tasks_queue[0])
            original()

        return receive

    def _in_stream(self, original: Callable[[Tensor], Any], direction: str) -> Callable[[Tensor], Any]:
        @functools.wraps(original)
        def call(tensor: Tensor) -> Any:
            coordinator = self._coordinator
            index = None
            if None not in self._groups:
                index = (coordinator.rank_in_group + (direction == "recv")) % 2
            group = self._groups[index]
            number = self._counts[direction, self._stream]
            self._counts[direction, self._stream] += 1
            group.step(number)
            self._layout = None
            if tensor.dim() == 3:
                b, s, c = tensor.shape
                self._layout = compactdist.Layout("(b s c) -> 1 (b s) c", b=b, s=s, c=c)
            plain = coordinator.device_group, coordinator.device_groups
            coordinator.device_group = group
            coordinator.device_groups = [group, group]
            try:
                with group.key(self._stream):
                    return original(tensor)
            finally:
                coordinator.device_group, coordinator.device_groups = plain
                self._layout = None

        return call
