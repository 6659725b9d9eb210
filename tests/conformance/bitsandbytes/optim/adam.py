"""Adam, which without weight decay is AdamW without weight decay."""

from typing import Any

from .._absent import NotInHalfbyteError
from .adamw import AdamW


class Adam(AdamW):
    def __init__(self, params: Any, *args: Any, weight_decay: float = 0.0, **kwargs: Any) -> None:
        if weight_decay:
            raise NotInHalfbyteError(type(self).__name__, "weight decay in the gradient")
        super().__init__(params, *args, weight_decay=0.0, **kwargs)


class Adam8bit(Adam):
    bits = 8


class Adam32bit(Adam):
    bits = 32


class PagedAdam(Adam):
    paged = True


class PagedAdam8bit(Adam8bit):
    paged = True


class PagedAdam32bit(Adam32bit):
    paged = True
