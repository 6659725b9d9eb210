"""A .gguf file as a checkpoint: its tensors under the model's own names, each dequantized when it is asked for.

transformers has two readers: for some architectures its conversion mappings (lazy already), for the rest an
older one that dequantizes the whole file at once. Where the older one only transforms values, the same
transformation is applied here a tensor at a time; where it also renames or splits (fused experts), it is used
as it is, and memory then holds the whole model in 16 bits for a moment.
"""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.gguf.reader import GgufHeader, TensorInfo, load_gguf_state_dict
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
    load_gguf_checkpoint,
)

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.source import reason

_TRANSFORM_VALUES_ONLY = (TensorProcessor, LlamaTensorProcessor, Gemma2TensorProcessor, NemotronTensorProcessor)


def read_gguf_tensors(
    file: Path, config: PreTrainedConfig, model_class: type[PreTrainedModel], dtype: torch.dtype
) -> tuple[dict[str, Any], list[Any]]:
    """The tensors by name, and the conversions that transformers must run on them (none for most).

    Raises:
        HalfbyteError: not GGUF, truncated, or of an architecture or a block type that is not read.
    """
    header = read_header(file)
    if is_gguf_arch_supported(header.architecture):
        mapping = get_gguf_conversion_mapping(header.architecture, config)
        in_blocks, _, _ = get_gguf_plan(header, mapping)
        return dict(load_gguf_state_dict(header)), add_gguf_load_ops(mapping, in_blocks, header, dtype)
    with torch.device("meta"):
        model = model_class(config)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    if type(processor) not in _TRANSFORM_VALUES_ONLY:
        try:
            parsed = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model, torch_dtype=dtype)
        except (NotImplementedError, ValueError) as error:
            raise HalfbyteError(f"{file}: {header.architecture!r} cannot be loaded from GGUF: {error}") from error
        return parsed["tensors"], []
    names = _parameter_names(header.architecture, model, config.num_hidden_layers)
    blob = np.memmap(file, mode="r", dtype=np.uint8)
    # A tensor that the model has no parameter for (rope_freqs) is something that it computes itself.
    tensors = {
        names[info.name]: _GgufTensor(blob, header.data_start, info, processor)
        for info in header.tensors
        if info.name in names
    }
    return tensors, []


class _GgufTensor:
    """A tensor of the file, read and dequantized when it is indexed with `[...]`."""

    def __init__(self, blob: np.ndarray, data_start: int, info: TensorInfo, processor: TensorProcessor) -> None:
        start = data_start + info.offset
        self._blocks = blob[start : start + info.nbytes]
        self._info = info
        self._processor = processor

    def __getitem__(self, _: Any) -> Tensor:
        shape = self._info.shape
        blocks = self._blocks.reshape(prod(shape[:-1]), -1)  # rows of the tensor, as GGML keeps them
        with np.errstate(all="ignore"):  # what is not finite is told by name, once the model is filled
            values = dequantize(blocks, GGMLQuantizationType(self._info.ggml_type)).reshape(shape)
        values = self._processor.process(weights=values, name=self._info.name).weights
        return torch.from_numpy(np.array(values))  # a copy: the file is mapped read-only


def _parameter_names(architecture: str, model: PreTrainedModel, layers: int) -> dict[str, str]:
    """GGUF's name of each of the model's parameters, to the model's own, by the gguf package's tables."""
    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(known[architecture], layers)
    prefix = f"{model.base_model_prefix}."
    names = {}
    for name in model.state_dict():
        stem, dot, suffix = name.rpartition(".")
        # Some architectures were converted from the model without its head, so without the prefix.
        found = table.get_name(stem) or table.get_name(stem.removeprefix(prefix))
        if found is not None:
            names[found + dot + suffix] = name
    return names


def read_header(file: Path) -> GgufHeader:
    """What a .gguf file says of itself and its tensors.  Raises HalfbyteError: not GGUF, or truncated."""
    try:
        header = GgufHeader.from_file(str(file))
    except Exception as error:  # ValueError, struct.error, IndexError: all mean a file that cannot be read
        raise HalfbyteError(f"{file} is not a GGUF file that can be read ({reason(error)}).") from error
    end = max((header.data_start + info.offset + info.nbytes for info in header.tensors), default=0)
    if file.stat().st_size < end:
        raise HalfbyteError(f"{file} is truncated: {file.stat().st_size} bytes of {end}; fetch it again.")
    return header
