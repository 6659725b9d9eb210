"""bitsandbytes' public 4-bit names over halfbyte, so that the tests of other projects can be run against it.

Every product, code and update here is computed by `halfbyte.ops`, `halfbyte.quant`, `halfbyte.nn` and
`halfbyte.optim`; this package renames arguments and keeps state under the names that those tests look for. It is
for tests alone: put the folder that it lies in on the path, or run `make conformance SUITE=DIR`. What halfbyte has
not (LLM.int8(), other optimizers) raises `NotInHalfbyteError`, which is a NotImplementedError.
"""

from . import _ops, cextension, functional, utils
from .autograd._functions import MatmulLtState, matmul, matmul_4bit
from .nn import modules
from .optim import adam

__version__ = "0.50.2"  # the version whose names these are
features = {"multi_backend"}
supported_torch_devices = {"cpu"}

__all__ = [
    "MatmulLtState",
    "_ops",
    "adam",
    "cextension",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "utils",
]
