"""compactdist for xDiT (xfuser): compressed sequence, pipeline and CFG parallelism, without a change to xfuser.

    import compactdist_xdit

    pipe = xFuserFluxPipeline(...)
    with compactdist_xdit.enable(pipe, codec="int2") as handle:
        pipe(...)
        print(handle.explain())

`compactdist_xdit.cpu.install()` lets pip's xfuser run on a CPU with gloo, and `load_digits_pipeline()` gives
a small trained FLUX model to try things on. xfuser and diffusers are imported only when something that needs
them is called.
"""

from typing import Any

from compactdist_xdit.adapter import Handle, enable
from compactdist_xdit.digits import decode_latents, load_digits_pipeline
from compactdist_xdit.flags import add_cli_args, options_from

__all__ = ["Handle", "add_cli_args", "cpu", "decode_latents", "enable", "load_digits_pipeline", "options_from"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `python -m compactdist_xdit.cpu` imports this package first, and would run a second copy.
    if name == "cpu":
        import compactdist_xdit.cpu as cpu

        return cpu
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
