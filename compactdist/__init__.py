"""compactdist: residual-compressed communication behind torch.distributed.

dist = compactdist.wrap(codec="int2")
for t in timesteps:
    with dist.step():
        dist.all_gather_into_tensor(out, kv)
print(dist.explain())
"""

__version__ = "0.1.0"

from compactdist import codecs
from compactdist.config import Options
from compactdist.errors import CompactDistError
from compactdist.group.backend import register_backend as _register_backend
from compactdist.group.process_group import CompressedProcessGroup
from compactdist.group.wrap import unwrap, unwrap_mesh, wrap, wrap_mesh
from compactdist.observe.record import Recording, record
from compactdist.observe.stats import Stats
from compactdist.policy import Answer, CallInfo, Rule, Rules
from compactdist.state import Layout

__all__ = [
    "Answer",
    "CallInfo",
    "CompactDistError",
    "CompressedProcessGroup",
    "Layout",
    "Options",
    "Recording",
    "Rule",
    "Rules",
    "Stats",
    "__version__",
    "codecs",
    "record",
    "unwrap",
    "unwrap_mesh",
    "wrap",
    "wrap_mesh",
]

_register_backend()
