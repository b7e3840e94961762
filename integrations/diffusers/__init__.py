"""compactdist for diffusers: compressed context parallelism, ring and Ulysses, without a change to diffusers.

    import compactdist_diffusers

    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    with compactdist_diffusers.enable(pipe, codec="int2") as handle:
        pipe(...)
        print(handle.explain())

`compactdist_diffusers.cpu.install()` lets context parallelism run on a CPU with gloo, and
`compactdist_diffusers.tiny.build(name)` makes tiny pipelines to try things on. diffusers is imported only when
something that needs it is called.
"""

from compactdist_diffusers.adapter import Handle, enable

__all__ = ["Handle", "enable"]
