"""FLUX.1 on xDiT, compressed.

torchrun --nproc-per-node 2 examples/flux_example.py --ulysses_degree 2 --compact_codec int2
torchrun --nproc-per-node 2 examples/flux_example.py --tiny --ring_degree 2 --compact_codec int2     # on a CPU
"""

import xdit_common

# isort: split
from xfuser import xFuserFluxPipeline

from compactdist_harness import xdit

MODEL = "black-forest-labs/FLUX.1-dev"
PROMPT = "A cat holding a sign that says hello world"
DEFAULTS = {"num_inference_steps": 28}


def main() -> None:
    args, engine_config, inputs = xdit_common.start(MODEL, PROMPT, **DEFAULTS)
    if args.tiny:
        pipe, call_kwargs = xdit.tiny_under(engine_config, "flux")
    else:
        pipe = xdit_common.load(xFuserFluxPipeline, args, engine_config)
        call_kwargs = {
            "prompt": inputs.prompt,
            "height": inputs.height,
            "width": inputs.width,
            "max_sequence_length": 256,
            "num_inference_steps": inputs.num_inference_steps,
            "generator": xdit_common.generator(inputs),
        }
    xdit_common.run(pipe, call_kwargs, args, "flux.png")


if __name__ == "__main__":
    main()
