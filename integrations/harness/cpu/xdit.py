"""Let pip's xfuser (0.7.0) run on a CPU with gloo.

xfuser expects an accelerator: without one it raises at import, and a few module globals that its sequence parallelism
reads stay empty. `install()` replaces the functions that raise and fills the globals, from outside: the files of xfuser
stay as pip installed them. Where CUDA is available, `install()` does nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

# xfuser's attention modules import triton even on a CPU. pip installs triton only along with a CUDA build of torch,
# hence the second command.
PIP_COMMAND = "pip install xfuser==0.7.0 && pip install --no-deps triton"
_ENVS = "xfuser.envs"
_MARK = "_compactdist_cpu"


class _EnvsLoader(Loader):
    """Runs `xfuser/envs.py` as it is, then replaces those of its functions that presuppose an accelerator."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        envs: Any = module
        # A CUDA build of torch on a machine without a GPU would otherwise be taken for a GPU machine.
        envs._is_cuda = lambda: False
        # Raises "No Accelerators" on a CPU; the configuration only compares it with a minimal CUDA version.
        envs.get_device_version = lambda: "12.0"
        # Raises as well; this becomes the backend of init_process_group and of every new_group.
        envs.get_torch_distributed_backend = lambda: "gloo"
        # xfuser sets it where CUDA is available. It guards the Ulysses and ring groups, which need no CUDA.
        envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
        setattr(module, _MARK, True)


class _EnvsFinder(MetaPathFinder):
    """Finds exactly one module, `xfuser.envs`, and loads it through `_EnvsLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _ENVS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _EnvsLoader(spec.loader)
        return spec


def install() -> None:
    """Import xfuser and make it usable on a CPU; call it before anything else imports xfuser. Idempotent."""
    if torch.cuda.is_available():
        return
    if _ENVS in sys.modules:
        if hasattr(sys.modules[_ENVS], _MARK):
            return
        raise RuntimeError("compactdist_harness.cpu.xdit.install() must be called before xfuser is imported")
    missing = [name for name in ("xfuser", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"running xDiT needs {' and '.join(missing)}; install with: {PIP_COMMAND}")

    # Other modules of xfuser call functions of envs while they are imported, and keep the results. So envs is patched
    # in the middle of xfuser's import: right after its own code ran, before another module reads it.
    finder = _EnvsFinder()
    sys.meta_path.insert(0, finder)
    try:
        import xfuser  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
    _fill_process_groups()
    _register_attention()
    _fix_pipefusion()


def _fill_process_groups() -> None:
    """Give `PROCESS_GROUP`, the holder of the Ulysses and ring groups, to the modules that import it only with CUDA."""
    from xfuser.core.distributed import fp8_comms
    from xfuser.model_executor.layers import usp
    from yunchang.globals import PROCESS_GROUP

    usp.PROCESS_GROUP = PROCESS_GROUP
    fp8_comms.PROCESS_GROUP = PROCESS_GROUP


def _register_attention() -> None:
    """Register the one CPU kernel that returns the log-sum-exp, by which ring attention merges blocks."""
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    def flash_for_cpu(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float,
        is_causal: bool,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query, key, value `(B, H, S, D)` -> output `(B, H, S, D)` and log-sum-exp `(B, H, S)`."""
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p=dropout_p, is_causal=is_causal
        )
        return output, lse

    ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA_FLASH] = flash_for_cpu


def _fix_pipefusion() -> None:
    """Replace three methods of the pipeline's coordinator that rely on properties of NCCL that gloo lacks."""
    import torch.distributed as dist
    from xfuser.core.distributed import group_coordinator

    coordinator: Any = group_coordinator.PipelineGroupCoordinator

    # The original calls torch.cuda.synchronize().
    group_coordinator.synchronize = lambda *args, **kwargs: None

    # xfuser drops the Work of an asynchronous send. gloo abandons a send whose Work is gone, and the receiver waits for
    # ever. So the coordinator keeps its Works until they are done.
    def keep(self: Any, work: Any) -> Any:
        works = self.__dict__.setdefault("_cpu_works", [])
        works[:] = [w for w in works if not w.is_completed()]
        works.append(work)
        return work

    original_isend = coordinator._pipeline_isend

    def pipeline_isend(self: Any, tensor: torch.Tensor) -> Any:
        return keep(self, original_isend(self, tensor))

    # Both neighbours may send a shape to each other at the same time. NCCL sends so small a message at once, gloo waits
    # for the receiver. So this waits for the received shape only, never for the sent one.
    def communicate_shapes(
        self: Any, tensor_send_to_next: torch.Tensor | None = None, recv_prev: bool = False
    ) -> torch.Size:
        group = self.device_group
        if tensor_send_to_next is not None:
            for numbers in ([tensor_send_to_next.dim()], list(tensor_send_to_next.shape)):
                message = torch.tensor(numbers, dtype=torch.int64)
                keep(self, dist.isend(message, self.next_rank, group=group))
        if not recv_prev:
            return torch.Size([0, 0, 0])
        ndim = torch.empty(1, dtype=torch.int64)
        dist.recv(ndim, self.prev_rank, group=group)
        shape = torch.empty(int(ndim), dtype=torch.int64)
        dist.recv(shape, self.prev_rank, group=group)
        return torch.Size(shape.tolist())

    coordinator._pipeline_isend = pipeline_isend
    coordinator._communicate_shapes = communicate_shapes
