"""AdamW: the same class with other defaults."""

from typing import Any

from .optimizer import Optimizer2State


class AdamW(Optimizer2State):
    bits, paged = None, False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if self.bits == 8 and kwargs.get("amsgrad"):
            raise ValueError(f"{type(self).__name__} does not support amsgrad=True")
        if self.bits is not None:
            if kwargs.get("optim_bits", 32) not in (32, self.bits):
                raise ValueError(f"{type(self).__name__} keeps {self.bits} bits; optim_bits says otherwise.")
            kwargs["optim_bits"] = self.bits
        if self.paged:
            kwargs["is_paged"] = True
        super().__init__(*args, **kwargs)


class AdamW8bit(AdamW):
    bits = 8


class AdamW32bit(AdamW):
    bits = 32


class PagedAdamW(AdamW):
    paged = True


class PagedAdamW8bit(AdamW8bit):
    paged = True


class PagedAdamW32bit(AdamW32bit):
    paged = True
