"""One pipeline's wrapped groups, and their turn in xfuser's global places.

xfuser keeps its groups in singletons, so two pipelines in one process take turns: the one that begins a request or
calls its transformer takes the other's wrapped groups out and puts its own in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import compactdist
from compactdist_common import Patches, before_forwards, call_all, chosen_option, compiled_call, unwrapped
from compactdist_xdit import methods, probe, routes
from compactdist_xdit.captured import Captured, holders
from compactdist_xdit.clock import Clock
from compactdist_xdit.fine import Fine, ends
from compactdist_xdit.long_context import LongContextSites
from compactdist_xdit.pipefusion import PipelineMessages
from compactdist_xdit.sites import Sites

_ACTIVE = "compactdist_session"  # attribute of PROCESS_GROUP, the singleton that holds the ring and Ulysses groups


class Session:
    """The wrapped groups of one pipeline, from `enable` to `close`.

    Args:
        pipe: a diffusers pipeline, or xfuser's wrapper around one. A transformer or scheduler that was assigned to the
            wrapper goes before that of the pipeline inside, as in xfuser.
        codec: for `compactdist.wrap`; `None` wraps nothing.
        wanted: names of routes.
        method: a parallel method, or `None`.
        exact_own: a rank attends to its own keys and values as they are.
        options: further arguments of `compactdist.wrap`.

    Attributes:
        groups: wrapped group by the name of its slot; empty until xfuser has made its groups. After `close` the closed
            groups remain, for their statistics.
    """

    def __init__(
        self,
        pipe: Any,
        codec: Any,
        wanted: Sequence[str],
        method: methods.GatheringMethod | None,
        exact_own: bool,
        options: dict[str, Any],
    ) -> None:
        self.pipe = pipe
        self.groups: dict[str, Any] = {}
        self.method = method
        if method is not None:
            method.timesteps = self.timesteps
        self._codec = codec
        self._wanted = tuple(wanted)
        self._exact_own = exact_own
        self._options = options
        self._slots: list[tuple[routes.Slot, Any, Any]] = []  # slot, plain group, wrapped group
        self._attached: list[torch.nn.Module] = []
        self._followed: list[Any] = []  # transformers, what `compile()` made of their calls, and the scheduler
        self._sites = Sites()
        self._long_context = LongContextSites()
        self._layers: list[Any] = []  # layers that keep groups of their own, see `captured`
        self._captured = Captured()
        self._messages: PipelineMessages | None = None
        self._attachments: list[Any] = []
        self._following = Patches()
        self._clock = Clock(self._begin_step, self._begin_scheduled_request)

    # --- groups -----------------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Wrap the groups that xfuser has now. Does nothing where these groups are wrapped already.

        Raises:
            ValueError: none of the routes spans more than one rank, or `probe.refuse` refuses the pipeline.
        """
        found = self._found()
        if self._codec is not None and not found:
            raise ValueError(
                f"no group of {', '.join(self._wanted)} spans more than one rank: set ring_degree, ulysses_degree or "
                "pipefusion_parallel_degree, or pass routes='cfg,sp' where only these groups are parallel"
            )
        if self._slots and self._is_bound(found) and _same(self._attached, self._bare_transformers()):
            return
        probe.refuse(self.pipe, [slot.route for slot, _ in found])
        self.unbind()
        try:
            for slot, plain in found:
                self._slots.append((slot, plain, self._wrap(slot, plain)))
        except BaseException:
            self.unbind()
            raise
        self.groups = {slot.name: wrapped for slot, _, wrapped in self._slots}
        self._sites.groups = self._long_context.groups = self.groups
        if self._messages is not None:
            self._messages.use({s.index: wrapped for s, _, wrapped in self._slots if s.route == "pipefusion"})
        self._attached = self._bare_transformers()
        self._layers = holders(module for transformer in self.transformers() for module in transformer.modules())
        for transformer in self._attached:
            self._attachments += [self.groups[name].attach(transformer, step_module=None) for name in self._stepped()]

    def _found(self) -> list[tuple[routes.Slot, Any]]:
        """The slots of the wanted routes, and the plain group that xfuser has for each now."""
        if self._codec is None:
            return []
        return [(slot, _plain(slot.get())) for slot in routes.slots(self._wanted)]

    def _is_bound(self, found: list[tuple[routes.Slot, Any]]) -> bool:
        return _same([plain for _, plain in found], [plain for _, plain, _ in self._slots])

    def _wrap(self, slot: routes.Slot, plain: Any) -> Any:
        # Attention uses its own keys and values as they are. Noise predictions and latents must be the same on all
        # ranks, or the ranks' pictures drift apart.
        exact = self._exact_own and slot.route in ("ring", "ulysses")
        options: dict[str, Any] = {"local": "exact" if exact else "reconstructed"}
        if slot.route in ("ring", "ulysses"):
            options["layouts"] = self._layout_of
        elif slot.route == "pipefusion":
            self._messages = self._messages or PipelineMessages(slot.owner)
            options["layouts"] = self._messages.layout_of
        if slot.route in ("cfg", "sp") and chosen_option("keyframe", self._options, None) is None:
            options["keyframe"] = "raw"  # small, and guidance or the scheduler makes the first step's error larger
        if not compactdist.codecs.get(self._codec).lossless:
            options["policy"] = self._policy(slot.route)
        if slot.route in ("cfg", "sp") and chosen_option("mode", self._options, "wait") != "wait":
            return compactdist.wrap(plain, self._codec, **options | self._options | {"mode": "wait"})
        return compactdist.wrap(plain, self._codec, **options | self._options)

    def _layout_of(self, info: Any) -> compactdist.Layout | None:
        return self._sites.layout_of(info) or self._long_context.layout_of(info)

    def _policy(self, route: str) -> Fine:
        if route != "pipefusion" or self._messages is None:
            return Fine(route)
        keyframes = int(chosen_option("warmup_steps", self._options, 1))
        return Fine(route, self._messages.last_stage, lambda: ends(keyframes, self.timesteps(), _whole_steps()))

    def unbind(self) -> None:
        """Give xfuser its own groups back, and close the wrapped ones.

        Raises:
            What closing a group raises, once all are closed.
        """
        self.deactivate()
        for attachment in self._attachments:
            attachment.detach()
        wrapped = [group for _, _, group in self._slots]
        self._attachments.clear()
        self._slots.clear()
        self.groups = {}
        self._messages = None
        call_all(group.close for group in wrapped)

    def _stepped(self) -> list[str]:
        """Names of the groups that step with the pipeline. PipeFusion's groups step with their messages."""
        return [slot.name for slot, _, _ in self._slots if slot.route != "pipefusion"]

    # --- taking turns -----------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Put the wrapped groups where xfuser looks for groups."""
        from yunchang.globals import PROCESS_GROUP

        before = getattr(PROCESS_GROUP, _ACTIVE, None)
        if before is self:
            return
        if before is not None:
            before.deactivate()
        setattr(PROCESS_GROUP, _ACTIVE, self)
        for slot, _, wrapped in self._slots:
            if slot.route != "pipefusion":  # PipelineMessages puts its group in for single messages
                setattr(slot.owner, slot.attribute, wrapped)
        if self.method is not None:
            self.method.install()
        self._sites.install()  # after the method, which replaces `ring_attn`: the replacement gets the names
        if {"ring", "ulysses"} & self.groups.keys():
            self._captured.install(self._layers, self.groups)
            self._long_context.install()
        if self._messages is not None:
            self._messages.install()

    def deactivate(self) -> None:
        """Put xfuser's own groups and functions back, if it is this session's turn."""
        from yunchang.globals import PROCESS_GROUP

        if getattr(PROCESS_GROUP, _ACTIVE, None) is not self:
            return
        delattr(PROCESS_GROUP, _ACTIVE)
        if self._messages is not None:
            self._messages.remove()
        self._long_context.remove()
        self._captured.remove()
        self._sites.remove()
        if self.method is not None:
            self.method.stand_back()
        for slot, plain, wrapped in self._slots:
            # xfuser may have put a new group into the slot meanwhile, which stays there.
            if slot.route != "pipefusion" and slot.get() is wrapped:
                setattr(slot.owner, slot.attribute, plain)

    # --- steps and requests -----------------------------------------------------------------------------------------

    def transformers(self) -> list[torch.nn.Module]:
        """The pipeline's transformers, one or two."""
        found = [getattr(self.pipe, name, None) for name in ("transformer", "transformer_2")]
        return [module for module in found if isinstance(module, torch.nn.Module)]

    def _bare_transformers(self) -> list[torch.nn.Module]:
        """The transformers without their wrappers, xfuser's ("module.") and torch.compile's ("_orig_mod.")."""
        return [unwrapped(transformer) for transformer in self.transformers()]

    def timesteps(self) -> int | None:
        """How many timesteps the scheduler has for the request, on every rank; `None` where it has no `timesteps`."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        return None if timesteps is None else len(timesteps)

    def follow(self) -> None:
        """Tell steps by the forwards of the transformers, and requests by the scheduler.

        Both may be replaced later, by xfuser's wrappers, by torch.compile or by a script that wants another scheduler.
        So every beginning of a request calls this again. It does nothing where it follows the same objects already.

        Raises:
            ValueError: the pipeline has no transformer.
        """
        transformers = self.transformers()
        if not transformers:
            raise ValueError(f"{type(self.pipe).__name__} has no transformer")
        if _same(self._followed, self._to_follow(transformers)):
            return
        self._following.undo()
        for transformer in transformers:
            before_forwards(transformer, self._before_forward, self._following)
        self._clock.follow(self.pipe.scheduler, self._following)
        self._followed = self._to_follow(transformers)

    def _to_follow(self, transformers: list[torch.nn.Module]) -> list[Any]:
        return [*transformers, *map(compiled_call, transformers), self.pipe.scheduler]

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._missed_a_beginning():
            self._clock.restart()
            self._begin_request()
        self.activate()
        self._clock.before_forward(module, args, kwargs)
        if self.method is not None:
            self.method.before_forward(module)

    def _missed_a_beginning(self) -> bool:
        """Whether the pipeline has another scheduler, or xfuser other groups, since the last request began."""
        if self.pipe.scheduler is not self._followed[-1]:
            return True
        return self._codec is not None and routes.initialized() and not self._is_bound(self._found())

    def _begin_step(self) -> None:
        for name in self._stepped():
            self.groups[name].step()
        if self.method is not None:
            self.method.begin_step()

    def _begin_scheduled_request(self) -> None:
        self._begin_request()
        if self._messages is not None:
            self._messages.check_nothing_left()

    def _begin_request(self) -> None:
        if self.method is not None:  # first, for it waits for gathers on the groups that are reset below
            self.method.new_request()
        self.follow()
        self.bind()
        self._clock.patch = _patch_of if _has_stages() else None
        for group in self.groups.values():
            group.reset()
        if self._messages is not None:
            self._messages.new_request()
        self.activate()

    def close(self) -> None:
        """Stop following the pipeline, give xfuser its own groups and functions back, and close the wrapped groups."""
        self._following.undo()
        if self.method is not None:
            self.method.new_request()
        groups = self.groups
        self.unbind()
        self.groups = groups


def _plain(group: Any) -> Any:
    """xfuser's own group, also where another session has put a wrapped one in its place."""
    return group.inner if isinstance(group, compactdist.CompressedProcessGroup) else group


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _has_stages() -> bool:
    from xfuser.core.distributed import parallel_state

    return routes.initialized() and parallel_state.get_pipeline_parallel_world_size() > 1


def _whole_steps() -> int:
    """PipeFusion's synchronous steps at the beginning of a request."""
    from xfuser.core.distributed import get_runtime_state

    return int(get_runtime_state().runtime_config.warmup_steps)


def _patch_of() -> int | None:
    """The patch that PipeFusion computes next; `None` in its synchronous steps."""
    from xfuser.core.distributed import get_runtime_state

    state = get_runtime_state()
    return int(state.pipeline_patch_idx) if state.patch_mode else None
