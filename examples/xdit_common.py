"""What the xDiT examples share: flags, the CPU that `--tiny` needs, and a compressed request.

Import it before xfuser: with `--tiny` it prepares xfuser for a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

import compactdist_xdit
from compactdist_harness.cpu import xdit as xdit_on_cpu

TINY = "--tiny" in sys.argv
if TINY:
    os.environ.setdefault("LOG_LEVEL", "error")  # read by xfuser at import
    xdit_on_cpu.install()


def start(model: str, prompt: str, **defaults: Any) -> tuple[argparse.Namespace, Any, Any]:
    """Read the command line. Returns its arguments, and xfuser's engine and input configurations.

    Args:
        model, prompt: for a command line without `--model` or `--prompt`.
        defaults: of other flags of xfuser, for instance `height=1024`.
    """
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description=f"{model} on xDiT, compressed")
    xFuserArgs.add_cli_args(parser)
    compactdist_xdit.add_cli_args(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model on CPU ranks instead of a checkpoint")
    given = [f"--{name}={value}" for name, value in defaults.items()]
    args = parser.parse_args(["--model", model, "--prompt", prompt, *given, *sys.argv[1:]])
    if args.tiny:
        if args.ring_degree * args.ulysses_degree * args.pipefusion_parallel_degree == 1 and not args.use_cfg_parallel:
            args.ring_degree = int(os.environ["WORLD_SIZE"])
        # Ring attention needs a kernel that returns the log-sum-exp; on a CPU there is one.
        args.attention_backend = args.attention_backend or ("SDPA_FLASH" if args.ring_degree > 1 else "SDPA")
    engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
    engine_config.runtime_config.dtype = torch.float32 if args.tiny else torch.bfloat16
    return args, engine_config, input_config


def load(wrapper: Any, args: argparse.Namespace, engine_config: Any) -> Any:
    """The checkpoint of the command line as one of xfuser's pipelines, on this rank's GPU."""
    return wrapper.from_pretrained(args.model, engine_config=engine_config, torch_dtype=torch.bfloat16).to(device())


def device() -> str:
    return f"cuda:{os.environ['LOCAL_RANK']}"


def generator(input_config: Any) -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(input_config.seed)


def run(pipe: Any, call_kwargs: dict[str, Any], args: argparse.Namespace, path: str) -> None:
    """Make one request, compressed as the command line says, and leave xfuser's groups.

    Without `--compact_*` flags nothing is compressed. The last rank saves the picture or video; with `--tiny` it prints
    how far the latents are from those of an uncompressed request, which is made before.
    """
    from xfuser.core.distributed import get_runtime_state

    options = compactdist_xdit.options_from(args)
    reference = None
    if options is None:
        output = pipe(**call_kwargs)
    else:
        if TINY:
            reference = pipe(**call_kwargs)
        with compactdist_xdit.enable(pipe, **options) as handle:
            output = pipe(**call_kwargs)
            if dist.get_rank() == 0:
                print(handle.explain())
    if output is not None and dist.get_rank() == dist.get_world_size() - 1:
        if TINY:
            print(compared(output[0], None if reference is None else reference[0]))
        else:
            save(output, path)
    dist.barrier()
    get_runtime_state().destroy_distributed_env()


def compared(latents: torch.Tensor, reference: torch.Tensor | None) -> str:
    """A line about the latents of a request."""
    text = f"latents {tuple(latents.shape)}, mean {latents.mean():.4f}, standard deviation {latents.std():.4f}"
    if reference is None:
        return text
    error = (latents - reference).norm() / reference.norm()
    return f"{text}, relative error against the uncompressed request: {error:.1e}"


def save(output: Any, path: str) -> None:
    """Write the picture or video."""
    if path.endswith(".mp4"):
        from diffusers.utils import export_to_video

        export_to_video(output.frames[0], path, fps=8)
    else:
        output.images[0].save(path)
