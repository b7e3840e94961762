"""The block of numbers that compiled steps are called with: one address in place of thirty arguments.

A block is int64, of ``SIZE`` slots, and begins a cache line. Slots hold addresses, sizes and flags. Those below
``DYNAMIC`` change from step to step and are written in one go; the others are written when a stream begins. Slots whose
names end in ``_ROOM`` are offsets in float32 from what ``SCRATCH`` is the address of.

A *work* is a loop that threads share, eight slots from its name on: how many parts are taken, how many workers have
begun, how many things there are, in how many parts, whether the last come first, the address of the loop, and how many
elements all are.
"""

from __future__ import annotations

from typing import NamedTuple

(
    X, BASE, VELOCITY, TERMS, OUT, PAYLOAD, CODES, OUT_STREAMS, THREADS, TEAM, SCRATCH, COPY, COPY_STREAMS, FACTOR,
    SECOND, SECOND_SCALES, DYNAMIC,
) = range(17)  # fmt: skip
"""``TERMS``: how many terms there are; 3: two, the second a ``spec.Velocity``. Then ``VELOCITY`` is the address of its
``previous``, and ``FACTOR`` has the bits of its coefficient. ``CODES``: where loops write and read codes: in the
payload, or in the scratch memory where they are packed apart. ``COPY``: where ``out`` is written a second time; 0 for
nowhere. ``SECOND``, ``SECOND_SCALES``: of two terms in eight bits, see ``TWO_IN_INT8``.
"""

(
    ROW_AT, CHUNK_AT, CHUNK_FROM, CHUNK_LEN, CHUNKS, GROUPS, ROWS, CHANNELS, NUMEL, ROW_COUNT, ELEMENTS, TILES, KIND,
    APART, WEIGHTED, SHARED, WIDENING, TABLE, CODES_NBYTES, ROW_SCALES_AT, ROW_SCALE_COUNT, CHANNEL_SCALES_AT,
    SCALE_COUNT, TOTAL_NBYTES, BAD, STAT_ROOM, T_ROOM, INVERSE_T_ROOM, NORMS_ROOM, WEIGHTS_ROOM, FIRST_ROOM,
    SECOND_ROOM, C_ROOM, INVERSE_C_ROOM, OWN_ROOM, OWN_EACH, BITS, ROW_WORDS, SUM, HISTORY, ROWS_APART,
) = range(DYNAMIC, DYNAMIC + 41)  # fmt: skip
"""``OWN_EACH``: float32 that each worker has for itself, one after the other from ``OWN_ROOM`` on. ``ROW_WORDS``: words
of the codes of each row or block; 0 if the payload is not summed up. ``SUM``: its checksum. ``HISTORY``: of
``history.py`` alone: where the addresses of the channel scales of this frame and of the next are; ``ROWS_APART``: every
how many rows are in the sums of squares. ``ROW_SCALE_COUNT`` counts bytes there.
"""

U, V, RANK, NUMBERS, GAINS, SQUARES, LENGTH, REFITS, LEVELS, SCALES, NEAR = range(KIND, KIND + 11)
"""Of ``lowrank.py`` alone. ``NUMBERS``: float32 that a loop takes; which, it says."""

(
    COMPONENTS, PLACES, DEPTHS, PLANES, STEPS, TURNED, ROW_SCALES, ROW_INVERSES, INVERSES, ENERGIES, AGREEMENTS,
    DECISIONS, THERE,
) = range(KIND, KIND + 13)  # fmt: skip
"""Of ``components.py``, ``trellis.py`` and ``inverse.py``, which says what it takes them for. ``COMPONENTS``: of all
blocks, or how many are weighed; ``PLACES``, ``DEPTHS``, ``PLANES``: where the int64 stand that say which a component
with bits is, its depth and its first plane; ``STEPS``: where the borders and levels of all depths are; ``TURNED``:
where float32 of all components or levels are; ``DECISIONS``: room for four bits of each row of each component with
bits; ``THERE``: where 64 float32 are, 1 for rows of the last turn that are there, else 0.
"""

HEIGHT = 16
"""Of ``inverse.py`` alone: rows whose products a worker keeps until they are put out."""

WORDS = KIND
"""Of ``checksum.py`` alone: how many words there are."""

RUN = 1024
"""Words of a checksum that one thread takes at a time."""

FIRST_PASS, FOLD, SECOND_PASS, APART_PASS = range(64, 96, 8)
SIZE = 96

TAKEN, WORKERS, COUNT, PARTS, BACKWARDS, BODY, WORK_ELEMENTS = range(7)

PARALLEL_ELEMENTS = 1 << 16
"""Below this a second thread takes longer to wake than it saves."""

PART_ELEMENTS = 1 << 18
"""Parts are about this large: a thread that starts late or has to wait leaves the rest to the others, and all end at
about the same time.
"""

BOUND, GRAIN, BORDERS, TABLE_SIZE = 48, 49, 50, 64
"""In the table, after three times sixteen float32: what holds a scale; what magnitudes are multiplied with before
borders are looked up; and the borders.
"""

MANY_TERMS, ONE_TERM, TERM_IN_INT8, TERM_IN_FP8, TWO_IN_INT8, TWO_IN_FP8 = range(6)
"""What loops are compiled for: any number of terms; one, the usual thing; one that is a ``spec.Rounded``, whose codes
``BASE`` is the address of, and ``VELOCITY`` that of its scales; two, of which the first is one, and ``SECOND`` and
``SECOND_SCALES`` the same of the second, or of the ``previous`` of a velocity.
"""

SIGN, NEAREST, TRITS, LINEAR, E4M3, E5M2 = range(6)
"""Kinds of codes. From ``LINEAR`` on, scales are such that the largest value takes the largest code."""

LITTLE, MUCH = 1024, 2048
"""Elements of a batch of blocks, unless one block is more, where there is little and much to compute. What is kept of
the batches under way should fit the first cache. The next batch is asked for while this one is read.
"""


class Work(NamedTuple):
    """What does not change of a work between two steps."""

    things: int
    elements: int
    body: int
    backwards: bool = False

    def slots(self) -> list[int]:
        """As the block holds it."""
        return [0, 0, self.things, 0, int(self.backwards), self.body, self.elements, 0]
