"""What the replays of a site's CUDA graphs count as.

The host learns how far graphs have moved each stream on. That says how often a site was replayed, but not which graph
it was, where two move the same streams and send other bytes besides: chunks of an all-to-all that are not compressed.
So graphs that count otherwise than a site's first ones count their own replays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from compactdist.kernels.spec import CLOCK_WORDS
from compactdist.state.device_clock import COUNTERS

if TYPE_CHECKING:
    from compactdist.state.stream import StreamState

__all__ = ["Captured", "Replays"]


class Captured(NamedTuple):
    """What a replay of a call site counts as.

    Attributes:
        op: of the site.
        codec_id: codec applied; empty: to nothing that leaves.
        raw_nbytes: bytes on the link if the call were not compressed.
        wire_nbytes: bytes on the link.
        numel: elements in all messages that leave.
        reasons: why nothing that leaves is compressed.
        receives: it is a receive, and the bytes are those that arrive.
    """

    op: str
    codec_id: str
    raw_nbytes: int
    wire_nbytes: int
    numel: int
    reasons: Any
    receives: bool


class _Alike:
    """Graphs whose replays count alike.

    Attributes:
        what: each counts as this.
        streams: those that each moves on, at least one; captured.
        words: of the first stream's clock. Once that has another one, the graphs have ended for good.
        at: which of the words is the counter; 0: there is none.
        seen: what the counter said when it was read last.
    """

    __slots__ = ("at", "seen", "streams", "what", "words")

    def __init__(self, what: Captured, streams: tuple[StreamState, ...], at: int) -> None:
        self.what, self.streams = what, streams
        self.words = _words_of(streams)
        self.at, self.seen = at, 0


def _words_of(streams: tuple[StreamState, ...]) -> Tensor:
    clock = streams[0].clock
    assert clock is not None
    return clock.words


class Replays:
    """The replays of the graphs that have captured calls of one site."""

    __slots__ = ("_graphs",)

    def __init__(self) -> None:
        self._graphs: list[_Alike] = []

    def counter(self, what: Captured, streams: tuple[StreamState, ...]) -> Tensor | None:
        """Where each replay of the graph that is being captured must add one, int64 ``[]``; ``None``: nowhere.

        Args:
            what: a replay counts as this.
            streams: those that a replay moves on, at least one; captured by now.

        Raises:
            OverflowError: no counter is left.
        """
        live = self._graphs = [one for one in self._graphs if one.words is _words_of(one.streams)]
        graph = next((one for one in live if one.what == what and one.streams == streams), None)
        if graph is None:
            words = _words_of(streams)
            at = 1 + max((one.at for one in live if one.words is words and one.at), default=CLOCK_WORDS - 1)
            if live and at == words.numel():
                raise OverflowError(f"its graphs differ in more than {COUNTERS} ways in what they send and receive")
            graph = _Alike(what, streams, at if live else 0)
            live.append(graph)
        return graph.words[graph.at] if graph.at else None

    def counted(self, moved: Mapping[StreamState, int]) -> Iterator[tuple[Captured, int]]:
        """What was replayed since the last look, and how often; the devices must be done with it.

        ``moved``: frames that graphs have made or checked since, by stream.
        """
        left = dict(moved)
        for graph in self._graphs:
            if graph.at:
                now = int(graph.words[graph.at])
                replays, graph.seen = now - graph.seen, now
                for stream in graph.streams:
                    left[stream] = left.get(stream, 0) - replays
                yield graph.what, replays
        for graph in self._graphs:
            if not graph.at:
                yield graph.what, max(left.get(stream, 0) for stream in graph.streams)
