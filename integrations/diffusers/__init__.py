"""compactdist for diffusers: compressed context parallelism."""
