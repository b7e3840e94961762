"""The residual loop: what both ends of a stream remember, and how they stay equal. Imports nothing distributed."""

from compactdist.state.captured import capture_check, capture_seal, catch_up, not_captured, unsuited
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.history import Order, Predictor
from compactdist.state.ledger import Ledger
from compactdist.state.matrix_view import Layout, MatrixView, blocks, plain
from compactdist.state.offload import STATE_OFFLOADS, Offload, StateOffload
from compactdist.state.quantized_history import StateForm
from compactdist.state.rate import RateControl
from compactdist.state.replays import Captured, Replays
from compactdist.state.residual import ResidualDecoder, ResidualEncoder
from compactdist.state.snapshot import SavedStreams, load_streams, save_streams
from compactdist.state.staged import Staged, Wanted
from compactdist.state.stand_in import FrameFollows, put_behind
from compactdist.state.store import Site, StateStore
from compactdist.state.stream import Room, StreamState
from compactdist.state.stream_config import (
    COMPRESSIBLE_DTYPES,
    DEFAULT_KEYFRAME,
    StreamConfig,
    keyframe_codec,
    state_nbytes,
)
from compactdist.state.target import STEERED, Met, Target, check_steered

__all__ = [
    "COMPRESSIBLE_DTYPES",
    "Captured",
    "DEFAULT_KEYFRAME",
    "FrameFollows",
    "MatrixView",
    "Met",
    "Order",
    "Predictor",
    "Layout",
    "Ledger",
    "Offload",
    "ResidualDecoder",
    "ResidualEncoder",
    "RateControl",
    "Replays",
    "Room",
    "SavedStreams",
    "STATE_OFFLOADS",
    "STEERED",
    "Site",
    "Staged",
    "StateForm",
    "StateOffload",
    "StateStore",
    "StreamConfig",
    "StreamDecoder",
    "StreamEncoder",
    "StreamState",
    "Target",
    "blocks",
    "capture_check",
    "capture_seal",
    "catch_up",
    "check_steered",
    "keyframe_codec",
    "load_streams",
    "not_captured",
    "plain",
    "put_behind",
    "save_streams",
    "state_nbytes",
    "unsuited",
    "Wanted",
]
