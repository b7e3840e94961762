"""What the adapters for xDiT and diffusers share. It imports neither framework.

* `Handle`: what both `enable` functions return.
* `Patches`: what an adapter changed in a framework's objects, and how to change it back.
* `CallSites`, `expect`, `any_of`: the name and the layout of the message that is about to be sent.
* `unwrapped`, `timestep_of`: the object inside a framework's wrapper, and the timestep of a transformer's call.
* `launch.run_as_main`: run a user's script after the adapter has been installed.
"""

from compactdist_common.handle import Handle
from compactdist_common.layouts import CallSites, Expected, any_of, expect
from compactdist_common.models import timestep_of, unwrapped
from compactdist_common.patches import Patches

__all__ = ["CallSites", "Expected", "Handle", "Patches", "any_of", "expect", "timestep_of", "unwrapped"]
