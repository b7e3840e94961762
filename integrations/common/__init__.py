"""What the adapters for xDiT and diffusers share. It imports neither framework.

* `chosen_codec`, `chosen_option`: the codec of an `enable` that was given none, and another option likewise.
* `Handle`: what both `enable` functions return.
* `Patches`: what an adapter changed in a framework's objects, and how to change it back; `call_all` closes what it can.
* `CallSites`, `expect`, `any_of`: the name and the layout of the message that is about to be sent.
* `unwrapped`, `uncompiled`: the object inside a framework's wrappers, and inside torch.compile's.
* `before_forwards`, `compiled_call`, `timestep_of`: a transformer's calls, compiled or not, and the timestep of one.
* `launch.run_as_main`: run a user's script after the adapter has been installed.
"""

from compactdist_common.codec import AUTO, chosen_codec, chosen_option
from compactdist_common.handle import Handle
from compactdist_common.layouts import CallSites, Expected, any_of, expect
from compactdist_common.models import before_forwards, compiled_call, timestep_of, uncompiled, unwrapped
from compactdist_common.patches import Patches, call_all

__all__ = [
    "AUTO",
    "CallSites",
    "Expected",
    "Handle",
    "Patches",
    "any_of",
    "before_forwards",
    "call_all",
    "chosen_codec",
    "chosen_option",
    "compiled_call",
    "expect",
    "timestep_of",
    "uncompiled",
    "unwrapped",
]
