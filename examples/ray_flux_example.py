"""FLUX.1 on xDiT's Ray workers, compressed. Needs Ray and GPUs; it has never been run.

COMPACTDIST_XDIT="--compact_codec int2" python examples/ray_flux_example.py --ulysses_degree 2 --ray_world_size 2 \\
    --model black-forest-labs/FLUX.1-dev --prompt "A cat holding a sign that says hello world"

Workers are processes of their own and build the pipeline themselves. So the flags reach them in an environment
variable, and the class that they are given turns compression on before it builds the pipeline.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch


class CompressedFluxPipeline:
    """`xFuserFluxPipeline` to xfuser's workers, which call nothing of it but `from_pretrained`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        from xfuser import xFuserFluxPipeline

        from compactdist_xdit import auto

        # Enables every pipeline that this process builds from now on; does nothing without COMPACTDIST_XDIT.
        auto.install_from_environment()
        return xFuserFluxPipeline.from_pretrained(*args, **kwargs)


def main() -> None:
    try:
        import ray
    except ImportError:
        sys.stderr.write("This example needs Ray, which is not installed: pip install ray\n")
        sys.exit(2)
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser
    from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline

    args = xFuserArgs.add_cli_args(FlexibleArgumentParser()).parse_args()
    args.use_ray = True
    engine_config, inputs = xFuserArgs.from_cli_args(args).create_config()
    engine_config.runtime_config.dtype = torch.bfloat16

    names = ("COMPACTDIST_XDIT", "MASTER_ADDR", "MASTER_PORT")
    defaults = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    environment = defaults | {name: os.environ[name] for name in names if name in os.environ}
    ray.init(runtime_env={"env_vars": environment})
    pipe = RayDiffusionPipeline.from_pretrained(
        PipelineClass=CompressedFluxPipeline,
        pretrained_model_name_or_path=args.model,
        engine_config=engine_config,
        torch_dtype=torch.bfloat16,
    )
    outputs = pipe(
        prompt=inputs.prompt,
        height=inputs.height,
        width=inputs.width,
        num_inference_steps=inputs.num_inference_steps,
        max_sequence_length=256,
        guidance_scale=inputs.guidance_scale,
        generator=torch.Generator().manual_seed(inputs.seed),
    )
    images = next(images for images in outputs if images is not None)
    images[0].save("flux.png")


if __name__ == "__main__":
    main()
