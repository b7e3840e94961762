"""State memory and traffic of a configuration, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compactdist.config import Options
from compactdist.errors import ConfigError
from compactdist.exchange.ops import patterns_by_op
from compactdist.exchange.parts import cut, number_of_parts
from compactdist.state import plain, state_nbytes
from compactdist.state.stream import StreamState

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """What one rank will hold and send, in bytes; traffic is that of one step.

    Attributes:
        state_bytes: history tensors of all sites together, and the codec's memory if ``channels`` were given.
        raw_bytes: uncompressed traffic.
        keyframe_bytes: traffic of a step of keyframes.
        wire_bytes: traffic of a step of residuals, headers and scales included.
        request_ratio: raw over wire for ``steps`` steps with their warm-up; ``None`` if no number of steps was given.
    """

    state_bytes: int
    raw_bytes: int
    keyframe_bytes: int
    wire_bytes: int
    request_ratio: float | None

    @property
    def ratio(self) -> float:
        """Raw over wire bytes of a compressed step."""
        return self.raw_bytes / self.wire_bytes if self.wire_bytes else 1.0


def estimate(
    options: Options,
    world_size: int,
    numel: int,
    *,
    op: str = "all_gather",
    dtype: torch.dtype = torch.bfloat16,
    sites: int = 1,
    steps: int | None = None,
    channels: int | None = None,
    groups: int = 1,
) -> Estimate:
    """Estimate state memory and traffic of ``sites`` equal call sites.

    Args:
        options: the group's options.
        world_size: ranks of the group.
        numel: elements of one message: the input of an all-gather, one chunk of an all-to-all, the tensor of a send.
        op: one of ``all_gather``, ``all_to_all``, ``send``, ``broadcast`` (as the root).
        dtype: of the tensors.
        sites: call sites per step (layers x calls per layer x branches).
        steps: steps of a request, for ``request_ratio``.
        channels: of a row of the tensors, which a layout hint says; without it, sizes are those without a hint, and the
            memory of a codec that learns (``transform``) is left out.
        groups: matrices of such rows that a tensor consists of, as the hint says, for instance 2 for keys and values.

    Raises:
        ConfigError: an unknown op or a number below 1.
        LayoutError: ``numel`` does not divide by ``channels * groups``.
    """
    patterns = patterns_by_op()
    if op not in patterns:
        raise ConfigError(f"op is one of {', '.join(patterns)}, got {op!r}")
    counts = {"world_size": world_size, "numel": numel, "sites": sites, "groups": groups}
    counts |= {name: n for name, n in (("steps", steps), ("channels", channels)) if n is not None}
    wrong = {name: n for name, n in counts.items() if not isinstance(n, int) or n < 1}
    if wrong:
        raise ConfigError(f"numbers of at least 1 are wanted, got {', '.join(f'{k}={n!r}' for k, n in wrong.items())}")
    links, encoders, decoders = patterns[op].histories(world_size)
    parts = number_of_parts(options.parts, numel, dtype, options.min_numel) if patterns[op].divides else 1
    numels = [each.numel for each in cut((numel,), parts, None)]
    held = sum(encoders * state_nbytes(options.stream, one, dtype, sender=True) for one in numels)
    held += sum(decoders * state_nbytes(options.stream, one, dtype, sender=False) for one in numels)
    stream, codec = StreamState(options.stream, 0, "estimate"), options.default_codec
    hints = [None if channels is None else replace(plain(one, groups, channels), hint=True) for one in numels]
    held += (encoders + decoders) * sum(codec.memory_nbytes(hint) for hint in hints if hint is not None)
    key, residual = (
        links * sites * sum(
            stream.frame_nbytes(codec, one, dtype, keyframe=keyframe, hint=hint)
            for one, hint in zip(numels, hints, strict=True)
        )
        for keyframe in (True, False)
    )  # fmt: skip
    raw = links * sites * numel * dtype.itemsize
    ratio = None
    if steps is not None:
        keys = min(steps, max(1, options.stream.warmup_steps))
        sent = keys * key + (steps - keys) * residual
        ratio = steps * raw / sent if sent else 1.0
    return Estimate(sites * held, raw, key, residual, ratio)
