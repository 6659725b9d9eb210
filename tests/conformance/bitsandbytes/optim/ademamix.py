"""AdEMAMix, which halfbyte has not: its names alone."""

from typing import Any

import torch

from .._absent import OTHER_OPTIMIZER, absent_class

_made: dict[str, Any] = {
    name: absent_class(name, OTHER_OPTIMIZER, torch.optim.Optimizer)
    for kind in ("AdEMAMix", "PagedAdEMAMix")
    for name in (kind, f"{kind}8bit", f"{kind}32bit")
}
_ReferenceAdEMAMix: Any = absent_class("_ReferenceAdEMAMix", OTHER_OPTIMIZER, torch.optim.Optimizer)
AdEMAMix, AdEMAMix8bit, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix32bit = _made.values()
