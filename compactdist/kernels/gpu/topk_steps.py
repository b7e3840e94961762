"""Fused steps of ``topk`` and ``topk_int4``: one launch picks and one puts back; between them a quantizer's launches
code what was kept.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from compactdist.kernels.gpu.launch import Launch, Slot
from compactdist.kernels.gpu.launched import DECODING, ENCODING, NOTHING, TO_DECODE, TO_ENCODE, Cut, LaunchedSteps, Own
from compactdist.kernels.gpu.plan import MOST_ELEMENTS, floats_of
from compactdist.kernels.gpu.steps import TritonSteps, can_run
from compactdist.kernels.gpu.steps import steps_of as quantizer_steps_of
from compactdist.kernels.gpu.topk import Runs
from compactdist.kernels.sections import padded_nbytes
from compactdist.kernels.spec import MatrixView, QuantizerSpec

__all__ = ["TopKSteps", "steps_of"]


_runs_of = lru_cache(maxsize=256)(Runs)


def steps_of(
    view: MatrixView, m: int, spec: QuantizerSpec | None, dtype: torch.dtype, device: torch.device
) -> TopKSteps | None:
    """The steps of one stream; ``None`` where there are no kernels for its device, dtype, or so many elements.

    Args:
        view: of its flat tensors.
        m: elements of a run.
        spec: of what codes the kept elements, seen as ``(G, 1, K)``; ``None``: they are bfloat16.
        dtype: of its tensors.
        device: of its tensors.
    """
    if not can_run(dtype, device) or not view.numel:
        return None
    runs = _runs_of(view, m, device)
    if runs.count * m > MOST_ELEMENTS:
        return None
    values = None
    if spec is not None:
        of_values = MatrixView(runs.count, view.groups, 1, runs.count // view.groups)
        values = quantizer_steps_of(spec, of_values, torch.float32, device)
        if values is None:
            return None
    return TopKSteps(runs, values, dtype, device)


class TopKSteps(LaunchedSteps):
    """The steps of one stream, see ``kernels.DeviceSteps``.

    Args:
        runs: of the stream.
        values: of the kept elements, float32; ``None``: they are bfloat16.
        dtype: of the tensors.
        device: of the tensors.
    """

    __slots__ = ("_kept_count", "_room", "_runs", "_values")

    def __init__(self, runs: Runs, values: TritonSteps | None, dtype: torch.dtype, device: torch.device) -> None:
        if values is None:
            nbytes, cut = padded_nbytes(2 * runs.count), Cut(runs.section, torch.int16)
            self._kept_count = nbytes // 2
        else:
            nbytes, cut = values.plan.sections.total_nbytes, Cut(runs.section, torch.uint8)
            self._kept_count = runs.count + runs.count % 2
        super().__init__(dtype, device, runs.section + nbytes, (cut,))
        self._runs, self._values = runs, values
        self._room = -(-self._kept_count // 4) * 4

    def encoding(self, terms: int, writes: bool, copies: bool, lockstep: bool) -> list[Launch]:
        x, terms_of, out, payload, flag, copy = TO_ENCODE
        values, runs = self._values, self._runs
        if values is None:
            section = Slot(ENCODING)
            of_pick = x, *terms_of, out, payload, section, flag, copy
            return [runs.pick(of_pick, ENCODING + 1, self._kept_count, terms, writes=writes, copies=copies)]
        found, back = Slot(ENCODING), Slot(ENCODING + 1)
        coding = values.encoding(0, writes, False, lockstep)
        scratch = range(ENCODING + 2, ENCODING + 2 + coding[0].given - ENCODING)
        section, given = Slot(scratch.stop), scratch.stop + 1
        common = *[found] * (1 + len(terms_of)), back, section, flag, back
        numbers = [*(slot.number for slot in common), *scratch]
        of_pick = x, *terms_of, x, payload, found, flag, x
        launches = [runs.pick(of_pick, given, self._kept_count, terms, writes=False, copies=False)]
        launches += [launch.renumbered(numbers, given) for launch in coding]
        if writes:
            of_spread = *terms_of, out, payload, back, payload, copy
            launches.append(runs.spread(of_spread, given, terms, checked=False, copies=copies))
        return launches

    def decoding(self, terms: int, checked: bool, copies: bool) -> list[Launch]:
        terms_of, out, payload, accepted, copy = TO_DECODE
        values, runs = self._values, self._runs
        if values is None:
            of_spread = *terms_of, out, payload, Slot(DECODING), accepted, copy
            return [runs.spread(of_spread, DECODING + 1, terms, checked=checked, copies=copies)]
        back, section, given = Slot(DECODING), Slot(DECODING + 1), DECODING + 2
        numbers = [slot.number for slot in (*[back] * len(terms_of), back, section, section, back)]
        of_spread = *terms_of, out, payload, back, accepted, copy
        return [
            *[launch.renumbered(numbers, given) for launch in values.decoding(0, False, False)],
            runs.spread(of_spread, given, terms, checked=checked, copies=copies),
        ]

    def to_encode(self, stream: int | None, lockstep: bool) -> Own:
        if self._values is None:
            return NOTHING
        kept, pointers = floats_of((self._room, self._room), self._device, stream)
        scratch = self._values.to_encode(stream, lockstep)
        return Own((*kept, *scratch.tensors), (*pointers, *scratch.pointers))

    def to_decode(self, stream: int | None) -> Own:
        return NOTHING if self._values is None else Own(*floats_of((self._room,), self._device, stream))
