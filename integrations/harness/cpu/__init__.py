"""xfuser, diffusers' context parallelism and yunchang on a machine without an accelerator, with gloo.

    from compactdist_harness.cpu import xdit
    xdit.install()                       # before the first import of xfuser

    from compactdist_harness.cpu import diffusers
    diffusers.install()                  # before enable_parallelism()

    from compactdist_harness.cpu import yunchang
    yunchang.install()                   # for layers with AttnType.TORCH_FLASH

    from compactdist_harness.cpu import cache_dit
    cache_dit.install()                  # before cache_dit.enable_cache()

A script of xDiT's that knows nothing of this runs as it is, with CUDA devices taken for the CPU (`pretend_cuda`):

    torchrun --nproc-per-node 2 -m compactdist_harness.cpu SCRIPT ...
    torchrun --nproc-per-node 2 -m compactdist_harness.cpu -m compactdist_xdit SCRIPT ... --compact_codec int2
"""
