"""CogVideoX on xDiT, compressed.

torchrun --nproc-per-node 2 examples/cogvideox_example.py --ulysses_degree 2 --compact_codec int2
torchrun --nproc-per-node 2 examples/cogvideox_example.py --tiny --ring_degree 2 --compact_codec int2     # on a CPU
"""

import xdit_common

# isort: split
from xfuser import xFuserCogVideoXPipeline

from compactdist_harness import xdit

MODEL = "THUDM/CogVideoX-2b"
PROMPT = "A little girl rides a bicycle along a river"
DEFAULTS = {"height": 480, "width": 720, "num_frames": 49, "num_inference_steps": 50}


def main() -> None:
    args, engine_config, inputs = xdit_common.start(MODEL, PROMPT, **DEFAULTS)
    if args.tiny:
        pipe, call_kwargs = xdit.tiny_under(engine_config, "cogvideox")
    else:
        pipe = xdit_common.load(xFuserCogVideoXPipeline, args, engine_config)
        call_kwargs = {
            "prompt": inputs.prompt,
            "height": inputs.height,
            "width": inputs.width,
            "num_frames": inputs.num_frames,
            "num_inference_steps": inputs.num_inference_steps,
            "generator": xdit_common.generator(inputs),
        }
    xdit_common.run(pipe, call_kwargs, args, "cogvideox.mp4")


if __name__ == "__main__":
    main()
