"""Stable Diffusion 3 on xDiT, compressed.

torchrun --nproc-per-node 2 examples/sd3_example.py --ulysses_degree 2 --compact_codec int2
torchrun --nproc-per-node 2 examples/sd3_example.py --tiny --ring_degree 2 --compact_codec int2     # on a CPU
"""

import xdit_common

# isort: split
from xfuser import xFuserStableDiffusion3Pipeline

from compactdist_harness import xdit

MODEL = "stabilityai/stable-diffusion-3-medium-diffusers"
PROMPT = "A cat holding a sign that says hello world"
DEFAULTS = {"num_inference_steps": 28}


def main() -> None:
    args, engine_config, inputs = xdit_common.start(MODEL, PROMPT, **DEFAULTS)
    if args.tiny:
        pipe, call_kwargs = xdit.tiny_under(engine_config, "sd3")
    else:
        pipe = xdit_common.load(xFuserStableDiffusion3Pipeline, args, engine_config)
        call_kwargs = {
            "prompt": inputs.prompt,
            "height": inputs.height,
            "width": inputs.width,
            "num_inference_steps": inputs.num_inference_steps,
            "generator": xdit_common.generator(inputs),
        }
    xdit_common.run(pipe, call_kwargs, args, "sd3.png")


if __name__ == "__main__":
    main()
