"""compactdist for diffusers: compressed context parallelism, ring and Ulysses, without a change to diffusers.

    import compactdist_diffusers

    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    with compactdist_diffusers.enable(pipe, codec="int2") as handle:
        pipe(...)
        print(handle.explain())

diffusers is imported only when a function that needs it is called. To try the adapter on a CPU, with tiny pipelines:
`compactdist_harness`.
"""

from compactdist_diffusers.adapter import Handle, enable

__all__ = ["Handle", "enable"]
