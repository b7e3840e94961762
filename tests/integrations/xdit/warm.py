"""What every worker imports, imported once: the process that ranks are forked from imports this and nothing else."""

import os
import warnings

warnings.simplefilter("ignore")
os.environ.setdefault("LOG_LEVEL", "error")

import torch  # noqa: E402

from compactdist_harness.cpu import xdit as xdit_on_cpu  # noqa: E402

torch.set_num_threads(1)
xdit_on_cpu.install()

import torch._dynamo  # noqa: E402
import xfuser  # noqa: E402
import xfuser.model_executor.pipelines.register  # noqa: E402, F401

import compactdist_xdit  # noqa: E402, F401
