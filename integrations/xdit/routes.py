"""Where xfuser keeps the groups its activations travel on, by route.

| route | group | what travels |
|-------|-------|--------------|
| ring | `PROCESS_GROUP.RING_PG` | K and V of ring attention, patch parallelism and DistriFusion |
| ulysses | `PROCESS_GROUP.ULYSSES_PG` | Q, K, V and the attention's output |
| pipefusion | the pipeline coordinator's | hidden states and latents between stages |
| cfg | the CFG coordinator's | the two branches' noise predictions |
| sp | the sequence-parallel coordinator's | outputs of every forward (Wan and others), the final latents |

The tensors on `cfg` and `sp` are small and feed the scheduler directly, where no attention averages errors out. So
these two routes are compressed only where the caller names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROUTES = ("ring", "ulysses", "pipefusion", "cfg", "sp")
USUAL = ("ring", "ulysses", "pipefusion")


@dataclass(frozen=True)
class Slot:
    """A place where xfuser keeps a group.

    Attributes:
        route: of the group.
        owner: the object with the attribute.
        attribute: holds the group, or a list of groups.
        index: of the group in the list; `None` where the attribute holds the group itself.
    """

    route: str
    owner: Any
    attribute: str
    index: int | None = None

    def get(self) -> Any:
        """The group that is in the slot now."""
        held = getattr(self.owner, self.attribute)
        return held if self.index is None else held[self.index]

    @property
    def name(self) -> str:
        """The route, with the index where the route has a group for each direction: `"pipefusion[0]"`."""
        return self.route if self.index is None else f"{self.route}[{self.index}]"


def chosen(routes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of routes from a list or a text with commas; `None`: those in `USUAL`.

    Raises:
        ValueError: an unknown route, or an empty list.
    """
    if routes is None:
        return USUAL
    names = tuple(part.strip() for part in routes.split(",")) if isinstance(routes, str) else tuple(routes)
    unknown = [name for name in names if name not in ROUTES]
    if unknown or not names:
        raise ValueError(f"routes must be among {', '.join(ROUTES)}, not {', '.join(map(repr, unknown)) or 'none'}")
    return tuple(dict.fromkeys(names))


def initialized() -> bool:
    """Whether xfuser has made its groups."""
    from xfuser.core.distributed import parallel_state

    return bool(parallel_state.model_parallel_is_initialized())


def slots(routes: Sequence[str]) -> list[Slot]:
    """The slots of these routes whose groups span more than one rank, the same on all ranks of a group."""
    from xfuser.core.distributed import parallel_state
    from yunchang.globals import PROCESS_GROUP

    pipeline = parallel_state.get_pp_group()
    where: dict[str, list[Slot]] = {
        "ring": [Slot("ring", PROCESS_GROUP, "RING_PG")],
        "ulysses": [Slot("ulysses", PROCESS_GROUP, "ULYSSES_PG")],
        "cfg": [Slot("cfg", parallel_state.get_cfg_group(), "device_group")],
        "sp": [Slot("sp", parallel_state.get_sp_group(), "device_group")],
        "pipefusion": [Slot("pipefusion", pipeline, "device_group")]
        if pipeline.world_size != 2  # two stages have a group for each direction
        else [Slot("pipefusion", pipeline, "device_groups", index) for index in range(2)],
    }
    found = [slot for route in routes for slot in where[route]]
    return [slot for slot in found if slot.get() is not None and slot.get().size() > 1]
