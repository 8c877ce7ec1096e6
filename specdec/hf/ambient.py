"""What a script sets for all of torch: what of it decoding depends on, and what it can't be done under.

No tensor of ours is made with torch's defaults, but the user's model may make some: a proof, and steps once compiled,
hold for the settings they were made under. (Dynamo would compile anew where one changes, but is not asked each time.)
Gradients, inference mode and autocast are turned off where we decode (see `specdec.handle`). The number of threads only
decides how fast it goes.
"""

from __future__ import annotations

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import deterministic
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from specdec.errors import Unsupported


def settings() -> tuple[object, ...]:
    """What a model's forward may depend on."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_float32_matmul_precision(),
    )


def check(device: torch.device) -> None:
    """Whether what torch is told to do with every operation leaves the results to us.

    Raises:
        Unsupported: it does not, or nobody can say.
    """
    if torch.is_autocast_enabled(device.type):
        raise Unsupported("autocast")
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    if others := [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]:
        raise Unsupported("a mode that sees, or changes, every operation of torch's", ", ".join(others))
