"""Wan 2.1 on xDiT, compressed: diffusers' pipeline with xfuser's transformer, as xfuser's own runner does it.

torchrun --nproc-per-node 2 examples/wan_example.py --ulysses_degree 2 --compact_codec int2
torchrun --nproc-per-node 2 examples/wan_example.py --tiny --ring_degree 2 --compact_codec int2     # on a CPU
"""

import xdit_common

# isort: split
import torch
from diffusers import WanPipeline
from xfuser.core.distributed import initialize_runtime_state
from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

from compactdist_harness import xdit

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PROMPT = "A little girl rides a bicycle along a river"
DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50}


def main() -> None:
    args, engine_config, inputs = xdit_common.start(MODEL, PROMPT, **DEFAULTS)
    if args.tiny:
        pipe, call_kwargs = xdit.tiny_under(engine_config, "wan")
    else:
        bf16 = {"torch_dtype": torch.bfloat16}
        transformer = xFuserWanTransformer3DWrapper.from_pretrained(args.model, subfolder="transformer", **bf16)
        pipe = WanPipeline.from_pretrained(args.model, transformer=transformer, **bf16).to(xdit_common.device())
        call_kwargs = {
            "prompt": inputs.prompt,
            "height": inputs.height,
            "width": inputs.width,
            "num_frames": inputs.num_frames,
            "num_inference_steps": inputs.num_inference_steps,
            "generator": xdit_common.generator(inputs),
        }
        initialize_runtime_state(pipe, engine_config)
    xdit_common.run(pipe, call_kwargs, args, "wan.mp4")


if __name__ == "__main__":
    main()
