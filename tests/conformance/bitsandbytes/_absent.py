"""What bitsandbytes has and halfbyte has not: names that can be imported, and say so when they are used.

A suite names many things while it is collected that few of its tests use; those tests alone should not apply.
"""

from collections.abc import Callable
from typing import Any, NoReturn

LLM_INT8 = "LLM.int8(): halfbyte computes in 4 bits"
OTHER_OPTIMIZER = "an optimizer other than Adam and AdamW"


class NotInHalfbyteError(NotImplementedError):
    """Raised when such a name is used. `reason` is what the report of the suite says."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is not in halfbyte: {reason}")
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self).partition(" is not in halfbyte: ")[0], self.reason)


def absent_class(name: str, reason: str, base: type = object) -> type:
    """A class that can be named, compared with and asked about, but not made."""

    def refuse(cls: type, *_: Any, **__: Any) -> NoReturn:
        raise NotInHalfbyteError(cls.__name__, reason)

    return type(name, (base,), {"__new__": refuse, "__init__": refuse, "__module__": "bitsandbytes"})


def absent_function(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotInHalfbyteError(name, reason)

    refuse.__name__ = name
    return refuse
