"""PixArt-alpha on xDiT, compressed.

torchrun --nproc-per-node 2 examples/pixart_alpha_example.py --ulysses_degree 2 --compact_codec int2
torchrun --nproc-per-node 2 examples/pixart_alpha_example.py --tiny --ring_degree 2 --compact_codec int2     # on a CPU
"""

import xdit_common

# isort: split
from xfuser import xFuserPixArtAlphaPipeline

from compactdist_harness import xdit

MODEL = "PixArt-alpha/PixArt-XL-2-1024-MS"
PROMPT = "A cat holding a sign that says hello world"
DEFAULTS = {"num_inference_steps": 20}


def main() -> None:
    args, engine_config, inputs = xdit_common.start(MODEL, PROMPT, **DEFAULTS)
    if args.tiny:
        pipe, call_kwargs = xdit.tiny_under(engine_config, "pixart")
    else:
        pipe = xdit_common.load(xFuserPixArtAlphaPipeline, args, engine_config)
        call_kwargs = {
            "prompt": inputs.prompt,
            "height": inputs.height,
            "width": inputs.width,
            "num_inference_steps": inputs.num_inference_steps,
            "generator": xdit_common.generator(inputs),
        }
    xdit_common.run(pipe, call_kwargs, args, "pixart_alpha.png")


if __name__ == "__main__":
    main()
