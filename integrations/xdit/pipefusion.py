"""PipeFusion's messages: hidden states and latents between stages.

Stages run ahead of one another and post receives early, so sender and receiver of a message see different steps and
different orders of calls. Both know the name of a message (`latent`, `encoder_hidden_states`), its patch, and how many
messages of that name and patch came before it in the request. The wrapped group is told that number as its step: here
`warmup_steps` counts the messages of a stream, and every patch has a history of its own.

The shape handshakes before the first messages stay on xfuser's own groups.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from compactdist_common import CallSites, Patches, any_of, expect


class PipelineMessages(CallSites):
    """Sends and receives the messages of one `PipelineGroupCoordinator` on wrapped groups.

    Args:
        coordinator: xfuser's, which has `device_groups` for two stages and `device_group` for more.
    """

    def __init__(self, coordinator: Any) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._groups: dict[int | None, Any] = {}
        self._stream = ""
        self._counts: Counter[tuple[str, str]] = Counter()
        self._patches = Patches()

    @property
    def last_stage(self) -> int:
        """Rank of the last stage, whose messages to the first are latents."""
        return int(self._coordinator.world_size) - 1

    def use(self, groups: dict[int | None, Any]) -> None:
        """Set the wrapped groups: by index in `device_groups` for two stages, the only one under `None` for more."""
        self._groups = groups

    def new_request(self) -> None:
        """Begin to count messages at 0 again."""
        self._counts.clear()

    def check_nothing_left(self) -> None:
        """Call this before a request.

        Raises:
            RuntimeError: the last request was broken off while messages were under way. xfuser neither takes back its
                receives nor clears its queues, so the messages of the next request would be taken for those of the
                last one, compressed or not.
        """
        coordinator = self._coordinator
        queued = [*coordinator.recv_tasks_queue, *((name, patch) for _, name, patch in coordinator.receiving_tasks)]
        if queued:
            messages = ", ".join(f"{name} {patch}" for name, patch in queued)
            raise RuntimeError(
                f"PipeFusion, stage {coordinator.rank_in_group}: the last request was broken off and left receives "
                f"behind ({messages}), which xfuser cannot take back; on every rank make its groups anew: "
                "parallel_state.destroy_model_parallel(), then initialize_runtime_state(pipe, engine_config)"
            )

    def install(self) -> None:
        """Replace methods of this coordinator; its class and other instances stay as they are."""
        for name in ("pipeline_send", "pipeline_isend"):
            self._patches.wrap(self._coordinator, name, self._naming_sent)
        self._patches.wrap(self._coordinator, "pipeline_recv", self._naming_received)
        self._patches.wrap(self._coordinator, "recv_next", self._naming_next)
        for name, direction in (("_pipeline_isend", "send"), ("_pipeline_irecv", "recv")):
            self._patches.wrap(self._coordinator, name, functools.partial(self._on_wrapped_group, direction))

    def remove(self) -> None:
        """Give the coordinator its own methods back. Calling it again does nothing."""
        self._patches.undo()

    def _name(self, name: str | None, patch: int) -> None:
        # Only latents are cut into patches. xfuser sends other tensors as segment -1 and receives them as segment 0.
        name = name or "latent"
        self._stream = f"{name}.{patch}" if name == "latent" and patch >= 0 else name

    def _naming_sent(self, original: Callable[..., None]) -> Callable[..., None]:
        def send(tensor: Tensor, name: str = "latent", segment_idx: int = -1) -> None:
            self._name(name, segment_idx)
            original(tensor, name=name, segment_idx=segment_idx)

        return send

    def _naming_received(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def receive(idx: int = -1, name: str = "latent") -> Tensor:
            self._name(name, idx)
            return original(idx=idx, name=name)

        return receive

    def _naming_next(self, original: Callable[[], None]) -> Callable[[], None]:
        def receive() -> None:
            if self._coordinator.recv_tasks_queue:
                self._name(*self._coordinator.recv_tasks_queue[0])
            original()

        return receive

    def _on_wrapped_group(self, direction: str, original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """The original, with the wrapped group in the coordinator's places while it runs."""

        def call(tensor: Tensor) -> Any:
            coordinator = self._coordinator
            index = None
            if None not in self._groups:
                index = (coordinator.rank_in_group + (direction == "recv")) % 2
            group = self._groups[index]
            number = self._counts[direction, self._stream]
            self._counts[direction, self._stream] += 1
            group.step(number)
            expected = expect("b s c", *tensor.shape) if tensor.dim() == 3 else any_of()
            swapped = Patches()
            swapped.replace(coordinator, "device_group", group)
            swapped.replace(coordinator, "device_groups", [group, group])
            try:
                with self.site(group, self._stream, expected):
                    return original(tensor)
            finally:
                swapped.undo()

        return call
