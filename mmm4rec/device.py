"""Where tensors live."""

from __future__ import annotations

import torch

from mmm4rec.errors import BadInput


def choose_device(name: str) -> torch.device:
    """The device of this name, or the best (`auto`). Raises BadInput where this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:  # torch's words for: no such device here
        reason = str(error).splitlines()[0]
        raise BadInput(f"device is '{name}', which this machine does not have ({reason}).", remedy="Use auto, cpu or cuda.") from error
