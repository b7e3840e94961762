"""compactdist for xDiT (xfuser): compressed sequence, pipeline and CFG parallelism, without a change to xfuser.

    import compactdist_xdit

    pipe = xFuserFluxPipeline(...)
    with compactdist_xdit.enable(pipe, codec="int2") as handle:
        pipe(...)
        print(handle.explain())

xfuser and diffusers are imported only when a function that needs them is called. To try the adapter on a CPU, with a
small trained model: `compactdist_harness`.
"""

from compactdist_xdit import auto
from compactdist_xdit.adapter import Handle, enable
from compactdist_xdit.flags import add_cli_args, options_from

__all__ = ["Handle", "add_cli_args", "auto", "enable", "options_from"]
