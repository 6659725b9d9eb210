"""A .gguf file as a checkpoint: its tensors under the model's own names, each dequantized when it is asked for.

transformers has two readers: for some architectures its conversion mappings (lazy already), for the rest an
older one that dequantizes the whole file at once. Where the older one only transforms values, the same
transformation is applied here a tensor at a time; where it also renames or splits (fused experts), it is used
as it is, and memory then holds the whole model in 16 bits for a moment.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict
from transformers.integrations.gguf.utils import (
    add_gguf_load_ops,
    get_gguf_conversion_mapping,
    get_gguf_plan,
    is_gguf_arch_supported,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    NemotronTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from halfbyte.errors import HalfbyteError

_TRANSFORM_VALUES_ONLY = (TensorProcessor, LlamaTensorProcessor, Gemma2TensorProcessor, NemotronTensorProcessor)


def read_gguf_tensors(
    file: Path, config: PreTrainedConfig, model_class: type[PreTrainedModel], dtype: torch.dtype
) -> tuple[dict[str, Any], list[Any]]:
    """The tensors by name, and the conversions that transformers must run on them (none for most).

    Raises:
        HalfbyteError: not GGUF, truncated, or of an architecture or a block type that is not read.
    """
    header = _read_header(file)
    if is_gguf_arch_supported(header.architecture):
        mapping = get_gguf_conversion_mapping(header.architecture, config)
        in_blocks, _, _ = get_gguf_plan(header, mapping)
        return dict(load_gguf_state_dict(header)), add_gguf_load_ops(mapping, in_blocks, header, dtype)
    with torch.device("meta"):
        model = model_class(config)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    try:
        if type(processor) not in _TRANSFORM_VALUES_ONLY:
            tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model, torch_dtype=dtype)
            return tensors["tensors"], []
        names = get_gguf_hf_weights_map(model, processor)
    except (NotImplementedError, ValueError) as error:
        raise HalfbyteError(f"{file}: GGUF architecture {header.architecture!r} cannot be loaded: {error}") from error
    # A name of GGUF's that the model has no parameter for (rope_freqs) is something that it computes itself.
    found = {
        names[tensor.name]: _GgufTensor(tensor, processor)
        for tensor in GGUFReader(file).tensors
        if tensor.name in names
    }
    return found, []


class _GgufTensor:
    """A tensor of the file, read and dequantized when it is indexed with `[...]`."""

    def __init__(self, tensor: ReaderTensor, processor: TensorProcessor) -> None:
        self._tensor = tensor
        self._processor = processor

    def __getitem__(self, _: Any) -> Tensor:
        values = dequantize(self._tensor.data, self._tensor.tensor_type)
        values = self._processor.process(weights=values, name=self._tensor.name).weights
        return torch.from_numpy(np.array(values))  # a copy: the file is mapped read-only


def _read_header(file: Path) -> GgufHeader:
    try:
        header = GgufHeader.from_file(str(file))
    except Exception as error:  # ValueError, struct.error, IndexError: all mean a file that cannot be read
        raise HalfbyteError(f"{file} is not a GGUF file that can be read ({error}).") from error
    end = max((header.data_start + info.offset + info.nbytes for info in header.tensors), default=0)
    if file.stat().st_size < end:
        raise HalfbyteError(f"{file} is truncated: {file.stat().st_size} bytes of {end}; fetch it again.")
    return header
