"""What ``benchmarks.gpu.kernels`` checks before it times anything: bytes, host reads, allocations, two ranks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from compactdist.codecs import Codec
from compactdist.kernels import use
from compactdist.state.matrix_view import Layout, blocks, plain

CODECS = ("binary", "ternary", "int2", "int3", "int4", "int8", "fp8")
SCALES = ("token_channel", "block")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gpu_kernels() -> Any:
    """The module under test; it imports Triton."""
    from compactdist.kernels.gpu import steps

    return steps


def cuts(*, small: bool) -> list[Any]:
    """Plain, permuted, with a tail, of several groups, of odd rows; and of more tiles than one kernel folds."""
    if small:
        return [plain(66 * 80, 1, 80), Layout("(h s d) -> 1 s (d h)", h=3, d=24).resolve(3 * 7 * 24), blocks(300)]
    return [
        plain(1088 * 3072, 1, 3072),
        plain(3 * 300 * 72, 3, 72),
        plain(97 * 65, 1, 65),
        plain(9000 * 264, 1, 264),
        blocks(128 * 70 + 3),
        Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=24, d=128).resolve(2 * 2 * 24 * 133 * 128),
        Layout("(h s d) -> 1 s (d h)", h=3, d=8).resolve(3 * 400 * 8),
    ]


def tensors(view: Any, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A base and what it has become, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    base, change = torch.randn(view.numel, generator=g), torch.randn(view.numel, generator=g)
    return base.to(dtype), (base + 0.1 * change).to(dtype)


def exactness(
    codec: Codec, device: torch.device, *, small: bool, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> dict[str, Any]:
    """A codec's payload, new base and decoding against the CPU's reference: a line, with its ``error`` if wrong."""
    kernels, cases = gpu_kernels(), 0
    wrong = {"payload": 0, "encoded": 0, "decoded": 0}
    for index, (view, dtype) in enumerate(itertools.product(cuts(small=small), dtypes)):
        if small and index % len(DTYPES) != len(codec.codec_id) % len(DTYPES):
            continue
        base, x = tensors(view, dtype)
        expected = torch.empty_like(x)
        with use("reference"):
            session = codec.open(view, dtype, x.device)
            reference = torch.empty(session.payload_nbytes, dtype=torch.uint8)
            session.encode(x, (base,), expected, reference)
        terms, held = (base.to(device, copy=True),), base.to(device, copy=True)
        steps, out = kernels.steps_of(codec.spec, view, dtype, device), torch.empty_like(held)
        payload = torch.empty_like(reference, device=device)
        assert steps.encode(x.to(device), terms, out, payload)
        assert steps.decode(reference.to(device), (held,), held)
        cases += 1
        wrong["payload"] += not torch.equal(payload.cpu(), reference)
        wrong["encoded"] += not torch.equal(out.cpu(), expected)
        wrong["decoded"] += not torch.equal(held.cpu(), expected)
    exact = cases > 0 and not any(wrong.values())
    found = {"cases": cases, "wrong": wrong, "exact": exact}
    return found if exact else {**found, "error": f"of {cases} cases these are wrong: {wrong}"}


class Step:
    """One step of a stream on a device, all memory in place: ``encode`` and ``decode`` only launch."""

    def __init__(self, codec: Codec, view: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.steps = gpu_kernels().steps_of(codec.spec, view, dtype, device)
        g = torch.Generator(device).manual_seed(0)
        self.base = torch.randn(view.numel, generator=g, device=device).to(dtype)
        self.x = self.base + 0.1 * torch.randn(view.numel, generator=g, device=device).to(dtype)
        self.out, self.held = torch.empty_like(self.x), torch.empty_like(self.x)
        nbytes = codec.payload_nbytes(view.shape, dtype)
        self.payload = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)

    def encode(self) -> None:
        self.steps.encode(self.x, (self.base,), self.out, self.payload, flag=self.flag)

    def decode(self) -> None:
        self.steps.decode(self.payload, (self.base,), self.held)

    @property
    def encode_bytes(self) -> int:
        """Read x and base, write the new base and the payload, each once."""
        return 3 * self.x.nbytes + self.payload.nbytes

    @property
    def decode_bytes(self) -> int:
        return 2 * self.x.nbytes + self.payload.nbytes


def host_reads(step: Step) -> bool:
    """Whether a step makes the host wait for the device."""
    step.encode(), step.decode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.encode(), step.decode()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def allocations(step: Step) -> int:
    """Allocations of ten steps."""
    step.encode(), step.decode()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        step.encode(), step.decode()
    return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)


def digests(rank: int, kernels: str, codec_id: str, numel: int) -> list[str]:
    """Body of a rank: what it received in five steps of a wrapped all-gather.

    Args:
        rank: of the default group.
        kernels: ``"cuda"`` for CUDA tensors and the kernels that these get by themselves; ``"interpreted"`` for CPU
            tensors on Triton's kernels in its interpreter; ``"reference"`` for CPU tensors on torch operations.
        codec_id: of the group.
        numel: of each rank's tensor.

    Raises:
        RuntimeError: Nothing was compressed, or not by Triton's kernels where these are under test.
    """
    device = "cuda" if kernels == "cuda" else "cpu"
    g = torch.Generator().manual_seed(rank)
    group = compactdist.wrap(dist.group.WORLD, codec=codec_id, min_numel=1)
    x, seen = torch.randn(numel, generator=g), []
    out = torch.empty(2 * numel, dtype=torch.bfloat16, device=device)
    with _chosen(kernels), _counting_triton() as made:
        for _ in range(5):
            x = x + 0.1 * torch.randn(numel, generator=g)
            group.step()
            group.all_gather_into_tensor(out, x.bfloat16().to(device))
            seen.append(hashlib.sha256(out.cpu().view(torch.uint8).numpy().tobytes()).hexdigest())
    if group.stats().compressed_calls == 0:
        raise RuntimeError(f"nothing was compressed:\n{group.explain()}")
    if (kernels != "reference") != bool(made):
        raise RuntimeError(f"kernels {kernels!r}: {len(made)} streams got Triton's kernels")
    group.close()
    return seen


def _chosen(kernels: str) -> AbstractContextManager[None]:
    """CUDA tensors get Triton's kernels by themselves; CPU tensors must be told."""
    if kernels == "cuda":
        return nullcontext()
    return use("gpu" if kernels == "interpreted" else "reference")


@contextmanager
def _counting_triton() -> Iterator[list[Any]]:
    """The steps that Triton's kernels were asked for, and made, inside the block."""
    module, made = gpu_kernels(), []
    steps_of = module.steps_of

    def counting(*args: Any, **settings: Any) -> Any:
        steps = steps_of(*args, **settings)
        made.extend([] if steps is None else [steps])
        return steps

    module.steps_of = counting
    try:
        yield made
    finally:
        module.steps_of = steps_of
