"""A LoRA adapter as llama.cpp loads it beside the .gguf file of its base (`--lora`).

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    blk.0.attn_q.weight.lora_a   (rank, in)     as in PEFT
    blk.0.attn_q.weight.lora_b   (out, rank)    its rows as the base's own are in the file

llama.cpp adds alpha / rank · B·A to each weight, with one alpha for all. Where layers are scaled otherwise (rsLoRA with
several ranks, an alpha a layer), alpha is 0, which is its sign for no scale at all, and the scale is in B.
"""

from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, Keys, LlamaFileType

from halfbyte.checkpoint.gguf import GgufFile
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.adapter_changes import Change, LowRank
from halfbyte.huggingface.gguf_families import GgufLayout


def write_gguf_adapter(changes: Mapping[str, Change], layout: GgufLayout, name: str, path: Path) -> GgufFile:
    """Write one adapter in float32, as PEFT saves it.

    Args:
        changes: of one adapter, by the base's names of parameters.
        layout: of the base.

    Raises:
        HalfbyteError: the adapter changes what llama.cpp's LoRA cannot: embeddings, biases, whole tensors, norms.
    """
    factors = {parameter: _factors(layout.names[parameter], change) for parameter, change in changes.items()}
    adapter = next(iter(changes.values())).adapter
    alphas = {low.scale * adapter.shapes[low.a][0] for low in factors.values()}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
    shapes: dict[str, tuple[tuple[int, ...], Kind]] = {}
    for parameter, low in factors.items():
        shapes[f"{layout.names[parameter]}.lora_a"] = adapter.shapes[low.a], Kind.F32
        shapes[f"{layout.names[parameter]}.lora_b"] = adapter.shapes[low.b], Kind.F32
    writer = GGUFWriter(None, layout.architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(LlamaFileType.ALL_F32)
    with GgufFile(path, writer, shapes) as file:
        for parameter, low in factors.items():
            place, transform = layout.names[parameter], layout.transforms.get(parameter)
            b = adapter.read(low.b) * (1.0 if alpha else low.scale)
            file.add(f"{place}.lora_a", adapter.read(low.a))
            file.add(f"{place}.lora_b", b if transform is None else transform(b))
    return file


def _factors(place: str, change: Change) -> LowRank:
    low = change.low_rank
    if low is None or low.magnitude is not None or change.bias is not None or place == "token_embd.weight":
        raise HalfbyteError(
            f"{change.adapter.directory} changes {place} in a way that llama.cpp's LoRA does not know; merge it"
            " into its base instead (leave --adapter_only out)."
        )
    return low
