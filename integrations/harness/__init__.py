"""What tests, examples, benchmarks and `compactdist demo` run the adapters with. The adapters import nothing of it.

* `compactdist_harness.tiny`: tiny diffusers pipelines with random weights.
* `compactdist_harness.digits`: a small trained FLUX model that draws handwritten digits.
* `compactdist_harness.xdit`: both under xDiT.
* `compactdist_harness.cpu`: xfuser and diffusers' context parallelism on a CPU with gloo.
* `compactdist_harness.demo_worker`: the ranks of `compactdist demo`.
"""
