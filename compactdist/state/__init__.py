"""The residual loop: what both ends of a stream remember, and how they stay equal. Imports nothing distributed."""

from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.history import History
from compactdist.state.matrix_view import Layout, MatrixView, blocks, plain
from compactdist.state.quantized_history import QuantizedHistory, StateForm
from compactdist.state.residual import ResidualDecoder, ResidualEncoder
from compactdist.state.staged import Staged
from compactdist.state.store import Site, StateStore
from compactdist.state.stream import COMPRESSIBLE_DTYPES, StreamConfig, StreamState, state_nbytes

__all__ = [
    "COMPRESSIBLE_DTYPES",
    "MatrixView",
    "History",
    "Layout",
    "QuantizedHistory",
    "ResidualDecoder",
    "ResidualEncoder",
    "Site",
    "Staged",
    "StateForm",
    "StateStore",
    "StreamConfig",
    "StreamDecoder",
    "StreamEncoder",
    "StreamState",
    "blocks",
    "plain",
    "state_nbytes",
]
