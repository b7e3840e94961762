"""The residual loop: what both ends of a stream remember, and how they stay equal. Imports nothing distributed."""

from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.layout import Arrangement, Layout, blocks, plain
from compactdist.state.predictor import History
from compactdist.state.quantized_history import QuantizedHistory, StateForm
from compactdist.state.residual import ResidualDecoder, ResidualEncoder
from compactdist.state.staged import Staged
from compactdist.state.store import Site, StateStore
from compactdist.state.stream import COMPRESSIBLE_DTYPES, StreamConfig, StreamState, state_nbytes

__all__ = [
    "COMPRESSIBLE_DTYPES",
    "Arrangement",
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
