"""Every private name of torch that compactdist uses, and what differs between versions of torch.

The suite runs on 2.11.0, 2.12.1, 2.13.0 and 2.14.1 (``make test-torch``). ``(2.13)`` after a name says in which
version's source it was read; where another version has another name, the code says which.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._dynamo.eval_frame import set_eval_frame as set_eval_frame
from torch.distributed import distributed_c10d as c10d

CHECKED_VERSIONS = ((2, 11), (2, 12), (2, 13), (2, 14))
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
"""Major and minor version of torch."""

_log = logging.getLogger("compactdist")


@functools.cache
def warn_untested() -> None:
    """Say once in a process if the suite does not run on this version of torch."""
    if VERSION not in CHECKED_VERSIONS:
        checked = ", ".join(f"{major}.{minor}" for major, minor in CHECKED_VERSIONS)
        _log.warning("torch %s is untested with compactdist, whose tests run on torch %s", torch.__version__, checked)


Work: Any = c10d.Work
"""Base of Python works: the pybind class whose trampoline calls ``wait`` and ``get_future`` (2.13)."""

BackendType: Any = dist.ProcessGroup.BackendType

PUBLIC_NAMES: frozenset[str] = frozenset(c10d.__all__) | {"group", "GroupMember", "ReduceOp", "Work", "P2POp"}
"""Names of the public torch.distributed API (``torch.distributed`` itself has no ``__all__``; 2.13)."""


AllgatherOptions: Any = c10d.AllgatherOptions  # type: ignore[attr-defined]
world: Any = c10d._world
"""What torch.distributed knows of its groups (2.13)."""
coalescing: dict[Any, Any] = c10d._world.pg_coalesce_state
"""By group inside a coalescing manager: the calls that it holds back (2.13)."""

is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool)
"""Whether a CUDA graph is being captured on the current stream (2.13); ``bool()`` is ``False``. Not to be asked for
tensors on a CPU: it may begin to use CUDA."""
_INDUCTOR_GRAPHS = "torch._inductor.cudagraph_trees"
"""The module that captures what ``torch.compile(mode="reduce-overhead")`` compiled (2.13)."""


def captured_by_inductor() -> bool:
    """Whether compiled code has begun the capture that is going on, by who runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != _INDUCTOR_GRAPHS:
        frame = frame.f_back
    return frame is not None


has_torch_function: Callable[[Any], bool] = torch._C._has_torch_function_unary
"""Whether a tensor's class, or a mode such as export's, replaces torch's functions of it (2.13)."""


_OLDER_NAMES = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
"""Names of torch.distributed's functions before torch 2.13, by those of 2.13, which warns at the old ones."""


def public_function(name: str) -> Any:
    """torch.distributed's function of this name, before torch 2.13 under the name it has there.

    Raises:
        AttributeError: this version of torch has none.
    """
    function = getattr(dist, name, None) or getattr(dist, _OLDER_NAMES.get(name, ""), None)
    if function is None:
        raise AttributeError(f"torch.distributed has no {name} in torch {torch.__version__}")
    return function


PROBED_NAMES = frozenset({"new_group"})
"""Methods torch looks for on a default group to delegate to (2.13: ``new_group``); ours are for users only."""


def asked_by_torch() -> bool:
    """Whether the caller's caller is torch.distributed's own code."""
    return sys._getframe(2).f_globals.get("__name__") == c10d.__name__


graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""Number of the autograd engine's task whose node this thread runs, -1 outside a backward pass (2.13)."""


def in_backward() -> bool:
    """Whether this thread runs a node of the autograd engine."""
    return graph_task() != -1


has_forward_mode: Callable[[], bool] = torch._C._is_fwd_grad_enabled
"""Whether forward-mode differentiation is on: an autograd Function's forward turns it off, and no_grad does not (2.13).
"""


def is_recorded(tensor: torch.Tensor) -> bool:
    """Whether gradients will flow through what is done with a tensor now.

    That is so where the tensor requires grad under grad mode, and for every tensor in the forward of an autograd
    Function whose inputs require grad: no tensor made there does, for grad mode is off. Compiled code that trains is
    such a Function.
    """
    if torch.is_grad_enabled():
        return tensor.requires_grad
    if has_forward_mode():
        return False
    return not torch.is_inference_mode_enabled() and _in_recorded_function()


def _in_recorded_function() -> bool:
    """Whether the forward of a Function that autograd records is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code  # torch 2.14 has no frame for Function.apply, which calls the forward
        if (code.co_name == "forward" or code.co_varnames[:1] == ("ctx",)) and _is_recorded(frame):
            return True
        frame = frame.f_back
    return False


def _is_recorded(forward: FrameType) -> bool:
    """Whether autograd records a Function: one of its inputs requires grad, and it was not called under no_grad.

    Args:
        forward: frame of what may be the Function's forward. Its first argument is the Function's node. Where the
            Function has a ``setup_context`` there is no node, and only the inputs can tell: then a call under no_grad
            counts as recorded, and one whose forward has put other values in place of its inputs does not.
    """
    code, values = forward.f_code, forward.f_locals
    given = [values.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        given += values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ())
    if given and isinstance(given[0], torch.autograd.function.FunctionCtx):
        return len(given[0].next_functions) > 0  # type: ignore[attr-defined]  # they are there before it runs (2.13)
    if code.co_name != "forward" or code.co_varnames[:1] == ("self",):
        return False  # a function that a forward calls, or a module's forward
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)


NO_TIMEOUT = timedelta(0)
"""What ``Work.wait`` is given where the group's own timeout counts (2.13)."""


def opaque(method: Callable[..., Any]) -> Any:
    """Wrap a method so that Dynamo neither traces it nor compiles what it calls (Dynamo crashes on groups).

    ``torch.compiler.disable`` does this in three Python frames a call, the wrapper made here in one (2.13).
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        callback = set_eval_frame(None)
        try:
            return method(*args, **kwargs)
        finally:
            set_eval_frame(callback)

    return mark_opaque(call)


def mark_opaque(function: Callable[..., Any]) -> Any:
    """Tell Dynamo not to trace into a function; the function itself switches Dynamo off for what it calls (2.13)."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "a call of a compactdist group"  # type: ignore[attr-defined]
    function._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
    return function


def constant_to_dynamo(function: Callable[..., Any]) -> Any:
    """Tell Dynamo to run a function that returns nothing while it traces, instead of tracing into it (2.13).

    torch 2.11 traces into properties of a group, here into the adoption of backends.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


without_autograd: Any = functools.partial(torch._C._InferenceMode, True)
"""Context in which tensors of any kind may be read and written and autograd sees nothing, versions included.

``torch.inference_mode`` would add a dozen Python frames to every compressed call (2.13).
"""

without_autocast: Any = torch._C._DisableAutocast
"""Context in which operations compute in the dtypes of their tensors, whatever the caller has switched on (2.13)."""

autocasts: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether operations may compute in other dtypes than their tensors', which is quicker asked than excluded (2.13)."""


def default_group() -> Any:
    """The default group; raises ValueError before init_process_group (2.13)."""
    return c10d._get_default_group()


def is_non_member(group: Any) -> bool:
    """Whether ``group`` is the placeholder that new_group returns on the ranks outside the new group."""
    return group is c10d.GroupMember.NON_GROUP_MEMBER


def is_registered(group: Any) -> bool:
    """Whether torch.distributed knows the group (2.13)."""
    return group in c10d._world.pg_map


def group_store(group: Any) -> Any:
    """The store a group was made with (2.13)."""
    return c10d._world.pg_map[group][1]


def is_fake(group: Any) -> bool:
    """Whether the group is torch's fake one, whose ranks never meet: all its backends are called so (2.13)."""
    names = set()
    for device in group._device_types:
        with contextlib.suppress(RuntimeError, AttributeError):  # as in ``timeout_of``
            names.add(group._get_backend(device).name())
    return names == {"fake"}


def is_known_name(name: str) -> bool:
    """Whether torch's registry has a group of this name, closed ones included (2.13)."""
    try:
        c10d._resolve_process_group(group_name(name))  # type: ignore[attr-defined]
    except (RuntimeError, LookupError):
        return False
    return True


def timeout_of(group: Any) -> float:
    """Seconds that the group's collectives wait for other ranks."""
    for device in group._device_types:
        try:
            return float(group._get_backend(device).options._timeout.total_seconds())
        except (RuntimeError, AttributeError):
            continue
    return 1800.0


_OFF = ("", "0", "n", "no", "f", "false")


def gloo_of(group: Any) -> Any:
    """The gloo backend that a group of torch's own has for CPU tensors, or ``None``.

    A class derived from torch's does something of its own in its methods, which nobody may go round. gloo that connects
    late (``TORCH_GLOO_LAZY_INIT``) reads the addresses of a store whenever it does: nobody would know when to remove
    them.
    """
    if type(group) is not dist.ProcessGroup or os.environ.get("TORCH_GLOO_LAZY_INIT", "0").lower() not in _OFF:
        return None
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return None
    return backend if isinstance(backend, getattr(c10d, "ProcessGroupGloo", ())) else None


def second_gloo(gloo: Any, store: Any) -> Any:
    """Another gloo backend of the same ranks, with the first's timeout; all ranks make it at a time (2.13).

    Args:
        gloo: the first.
        store: that nobody else uses; keeps each rank's addresses under ``gloo_addresses``.

    Raises:
        RuntimeError: ranks could not be connected in time.
    """
    _destroy_idle()
    return c10d.ProcessGroupGloo(store, gloo.rank(), gloo.size(), gloo.options._timeout)


def gloo_addresses(gloo: Any) -> list[str]:
    """The keys of this rank's addresses in the store that a gloo backend is made with (2.13)."""
    return [f"{device}/{gloo.rank()}" for device in range(len(gloo.options._devices))]


_left: list[tuple[Any, Collection[Any]]] = []
_left_lock = threading.Lock()


def leave_gloo(gloo: Any, works: Collection[Any]) -> None:
    """Let go of a gloo backend, and destroy it once its works are done: to destroy it waits for them (2.13)."""
    with _left_lock:
        _left.append((gloo, works))
    _destroy_idle()


def _destroy_idle() -> None:
    with _left_lock:
        idle = [one for one in _left if all(work.is_completed() for work in one[1])]
        for one in idle:
            _left.remove(one)


def device_for_small_messages(group: Any) -> torch.device:
    """A device whose tensors the group's collectives take: the CPU if it can be."""
    kinds = {device.type for device in group._device_types}
    if "cpu" in kinds or not kinds:
        return torch.device("cpu")
    return torch.device(min(kinds), torch.accelerator.current_device_index())


def adopt_backends(wrapper: Any, inner: Any) -> None:
    """Hand the inner group's backends to the wrapper's C++ base, for C++ code that goes round Python (2.13)."""
    names = c10d.BackendConfig(c10d.Backend(c10d._world.pg_backend_config[inner])).get_device_backend_map()
    _adopt(wrapper, inner, {device: c10d.Backend.backend_type_map.get(name) for device, name in names.items()})


def adopt_own_backends(wrapper: Any, inner: Any) -> None:
    """As ``adopt_backends``, for an inner group that torch does not know: gloo, and NCCL for CUDA tensors (2.13)."""
    _adopt(wrapper, inner, {"cpu": BackendType.GLOO, "cuda": BackendType.NCCL})


def _adopt(wrapper: Any, inner: Any, kinds: dict[str, Any]) -> None:
    default = None
    for device in inner._device_types:
        default = kinds.get(device.type) or BackendType.CUSTOM
        dist.ProcessGroup._register_backend(wrapper, device, default, inner._get_backend(device))
    if default is not None:
        wrapper._set_default_backend(default)


WEIGHT_CALLERS = (
    "torch.distributed.fsdp.",  # FSDP1, and FSDP2 below it
    "torch.distributed._composable.",  # where FSDP2 was before, and replicate, a form of DDP
    "torch.nn.parallel.",  # DDP: parameters, buffers, the end of a join
    "torch.distributed.utils.",  # what FSDP and DDP share
    "torch.distributed.algorithms.",  # communication hooks, joins, averages of models
    "torch.distributed.optim.",
    "torch.optim.",
    "torch.nn.utils.clip_grad.",
    "torch.distributed.checkpoint.",
    "torch.distributed._state_dict_utils.",
    "torch.distributed._shard.",
    "torch.distributed.tensor._api.full_tensor",
    "torch.distributed.tensor._api.distribute_tensor",
    "torch.distributed.tensor._api.distribute_module",
    "torch.nn.modules._functions.",  # SyncBatchNorm, whose statistics become buffers
)
"""Modules and functions that move weights, gradients, buffers or optimizer states, by how their names begin (2.13)."""

MODEL_CALLERS = (
    "torch.nn.modules.module.",
    "torch.distributed.fsdp._fully_shard._fully_shard.wrapped_method",  # register_fsdp_forward_method
    "torch._functorch.",
    "torch._inductor.",
    "torch.fx.",
)
"""Those that run a model's code, compiled or not: what called them says nothing about what that code moves (2.13)."""


class AroundCompiledCalls:
    """Runs functions before and after the calls of a module that was compiled in place, outside of its graph (2.13).

    ``module.compile()`` takes hooks into the graph, where they run once, while it is traced.

    Args:
        module: one for which ``compiled_in_place`` holds.
        before, after: called without arguments; ``after`` also where the call raises.
    """

    def __init__(self, module: torch.nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
        compiled: Any = module._compiled_call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            before()
            try:
                return compiled(*args, **kwargs)
            finally:
                after()

        self._module, self._compiled, self._call = module, compiled, call
        vars(module)["_compiled_call_impl"] = call

    def remove(self) -> None:
        """Give the module its own call back, unless it was compiled anew since."""
        if self._module._compiled_call_impl is self._call:
            vars(self._module)["_compiled_call_impl"] = self._compiled


def compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` was called, as ``compile_repeated_blocks`` of diffusers does for blocks (2.13)."""
    return module._compiled_call_impl is not None


AUTOGRAD_ENGINE = "torch.autograd.graph._engine_run_backward"
"""The function that runs the autograd engine, whose C++ nodes make calls of their own (2.13)."""


_DDP_MODULES = frozenset({"torch.distributed.utils", "torch.nn.parallel.distributed"})


def called_by_ddp() -> bool:
    """Whether DistributedDataParallel is being built: its C++ logger asks the group's base for backends (2.13)."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(6):
        if frame is None:
            break
        if frame.f_globals.get("__name__") in _DDP_MODULES:
            return True
        frame = frame.f_back
    return False


def register(wrapper: Any, inner: Any, name: str) -> None:
    """Make the wrapper a group torch.distributed knows by name, with inner's ranks, store and backend name (2.13)."""
    world = c10d._world
    backend, store = world.pg_map[inner]
    config = world.pg_backend_config[inner]
    ranks = {global_rank: i for i, global_rank in enumerate(dist.get_process_group_ranks(inner))}
    # without this prefix torch does not find the group by its tag, and permute_tensor makes another to learn a rank
    tag = f"user:{name}"
    # before torch 2.13 the same function has another name
    enter = first_method(c10d, ("_register_pg_in_world", "_update_process_group_global_state"))
    enter(
        wrapper,
        backend_name=backend,
        store=store,
        group_name=group_name(name),
        backend_config=config,
        rank_mapping=ranks,
        pg_tag=tag,
    )


def unregister(wrapper: Any) -> None:
    """Undo ``register``; nothing happens to a group torch.distributed no longer knows (2.13)."""
    world = c10d._world
    if wrapper not in world.pg_map:
        return
    name = world.pg_names[wrapper]
    tag = world.pg_to_tag.pop(wrapper, None)
    world.pg_map.pop(wrapper, None)
    world.pg_names.pop(wrapper, None)
    world.pg_group_ranks.pop(wrapper, None)
    world.pg_backend_config.pop(wrapper, None)
    coalescing.pop(wrapper, None)
    if tag is not None and wrapper in world.tags_to_pg.get(tag, []):
        world.tags_to_pg[tag].remove(wrapper)
        if not world.tags_to_pg[tag]:
            del world.tags_to_pg[tag]
    c10d._unregister_process_group(name)  # type: ignore[attr-defined]


def bury(wrapper: Any) -> None:
    """Keep a closed group under its name: compiled and functional code finds it and meets ClosedGroupError (2.13).

    torch's registry of names holds groups weakly. The name goes with the group, or when all groups are destroyed.
    """
    name = group_name(wrapper.group_name)
    c10d._register_process_group(name, wrapper)  # type: ignore[attr-defined]
    weakref.finalize(wrapper, _forget_name, name).atexit = False


def _forget_name(name: Any) -> None:
    if name not in c10d._world.pg_names.values():  # a new group may have it, after all were destroyed
        c10d._unregister_process_group(name)  # type: ignore[attr-defined]


def swap_mesh_dim(mesh: Any, dim: int, group: Any) -> Any:
    """Put ``group`` behind dimension ``dim`` of a DeviceMesh in place; returns the name that was there (2.13)."""
    old = mesh._dim_group_names[dim]
    mesh._dim_group_names[dim] = group.group_name
    for registry in _mesh_registries(mesh):
        registry[group.group_name] = group
    return old


def restore_mesh_dim(mesh: Any, dim: int, name: str, group: Any) -> None:
    """Undo ``swap_mesh_dim`` (2.13)."""
    if mesh._dim_group_names[dim] == group.group_name:
        mesh._dim_group_names[dim] = name
    for registry in _mesh_registries(mesh):
        registry.pop(group.group_name, None)


def _mesh_registries(mesh: Any) -> list[Any]:
    """Where compiled code looks for a mesh's groups by name: in the root of a sliced mesh (2.13)."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    registries = (getattr(owner, "_pg_registry", None) for owner in (mesh, root))
    return [registry for registry in registries if registry is not None]


def first_method(owner: Any, names: tuple[str, ...]) -> Any:
    """The first of several functions that a group or torch's module has: names changed between 2.11 and 2.13.

    Raises:
        AttributeError: ``owner`` has none of them.
    """
    for name in names:
        method = getattr(owner, name, None)
        if method is not None:
            return method
    raise AttributeError(f"{owner!r} has none of {', '.join(names)} (torch {torch.__version__})")


def inner_call(inner: Any, names: tuple[str, ...], *args: Any) -> Any:
    """Call the first of several methods that the inner group has."""
    return first_method(inner, names)(*args)


ALL_GATHER_SINGLE = ("all_gather_single", "_allgather_base")
ALL_TO_ALL_SINGLE = ("all_to_all_single", "alltoall_base")
REDUCE_SCATTER_SINGLE = ("reduce_scatter_single", "_reduce_scatter_base")
ALL_GATHER_COALESCED = ("all_gather_single_coalesced", "allgather_into_tensor_coalesced")
START_COALESCING = ("start_coalescing", "_start_coalescing")
END_COALESCING = ("end_coalescing", "_end_coalescing")
"""Names of 2.14, then those of 2.11 to 2.13."""
REDUCE_SCATTER_COALESCED = ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced")


def all_gather_single(inner: Any, output: Any, input: Any, opts: Any = None) -> Any:
    """The inner group's single-tensor all-gather under either name."""
    return inner_call(inner, ALL_GATHER_SINGLE, output, input, opts or options("AllgatherOptions"))


def all_to_all_single(
    inner: Any, output: Any, input: Any, arriving: list[int], leaving: list[int], opts: Any = None
) -> Any:
    """The inner group's single-tensor all-to-all under either name; splits in elements of dimension 0."""
    return inner_call(inner, ALL_TO_ALL_SINGLE, output, input, arriving, leaving, opts or options("AllToAllOptions"))


def allreduce_options(opts: Any, op: Any, timeout: Any) -> Any:
    """Of ProcessGroup's forms of an all-reduce: ``opts`` may be the reduction, as a second argument is there."""
    if opts is not None and type(opts).__name__ == "AllreduceOptions":
        return opts
    made, op = options("AllreduceOptions"), opts if op is None else op
    if op is not None:
        made.reduceOp = op
    if timeout is not None:
        made.timeout = timeout
    return made


def supports_coalescing(group: Any, device: torch.device) -> bool:
    """Whether the group, or else its backend, can issue several calls together (NCCL does; 2.13)."""
    own = getattr(group, "supports_coalescing", None)
    if own is not None:
        return bool(own)
    try:
        return bool(group._get_backend(device).supports_coalescing)
    except (RuntimeError, AttributeError):
        return False


_patch_lock = threading.Lock()


def patch_batch_isend_irecv(is_ours: Callable[[Any], bool]) -> None:
    """Let ``torch.distributed.batch_isend_irecv`` hand whole batches to wrapped groups.

    torch 2.13 groups a batch only if ``type(group) is ProcessGroup``; a subclass gets its sends and receives one by
    one, which can deadlock on NCCL. Called when a group with such a backend is wrapped, never on gloo. A caller that
    took the function by name before escapes the patch.
    """
    with _patch_lock:
        plain = c10d.batch_isend_irecv
        if getattr(plain, "_compactdist", False):
            return

        def batch_isend_irecv(p2p_op_list: list[Any]) -> Any:
            if p2p_op_list and is_ours(p2p_op_list[0].group):
                c10d._check_p2p_op_list(p2p_op_list)
                return p2p_op_list[0].group.batch_isend_irecv(p2p_op_list)
            return plain(p2p_op_list)

        batch_isend_irecv._compactdist = True  # type: ignore[attr-defined]
        c10d.batch_isend_irecv = batch_isend_irecv
        dist.batch_isend_irecv = batch_isend_irecv


def check_p2p_op_list(ops: list[Any]) -> None:
    """Torch's own check of a batch (2.13)."""
    c10d._check_p2p_op_list(ops)


def options(name: str) -> Any:
    """A default options object, e.g. ``"AllgatherOptions"`` (2.13)."""
    return getattr(c10d, name)()


def nccl_backend(opts: Any) -> Any:
    """An NCCL backend for a custom backend's creator, built as torch 2.13's own helper builds it (not run)."""
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = opts.timeout
    options.global_ranks_in_group = opts.global_ranks_in_group
    options.group_name = opts.group_id
    store = prefix_store("cuda/", opts.store)
    backend = c10d.ProcessGroupNCCL(store, opts.group_rank, opts.group_size, options)
    backend._set_sequence_number_for_group()
    return backend


def prefix_store(prefix: str, store: Any) -> Any:
    """A view of a store under a prefix (public class, not exported to type checkers; 2.13)."""
    return c10d.PrefixStore(prefix, store)


def group_name(name: str) -> Any:
    """A name of the type torch's registry wants (2.13)."""
    return getattr(c10d, "GroupName", str)(name)
