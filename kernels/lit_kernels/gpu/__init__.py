"""The Triton kernels and their launches; the modules above say what they compute and when they are taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Launch = TypeVar("Launch", bound=Callable[..., Any])


def on_its_device(launch: Launch) -> Launch:
    """Triton launches on the current device and its stream; this makes the first tensor's the current one."""

    @wraps(launch)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]  # of a `Quantised` its values
        if not first.is_cuda:
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return cast(Launch, guarded)
