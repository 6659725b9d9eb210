"""LoRA on an embedding in 4 bits: PEFT's layer, whose merge would add to codes, with one that quantizes again."""

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.tuners_utils import check_adapters_to_merge

from halfbyte.errors import HalfbyteError
from halfbyte.nn import Embedding4bit
from halfbyte.quant import QuantizedTensor, quantize_like


class LoraEmbedding4bit(PeftEmbedding):  # type: ignore[misc]
    """A low-rank term for an Embedding4bit: A `(r, rows)`, B `(width, r)`."""

    _before_merge: QuantizedTensor | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As PEFT's.  Raises HalfbyteError for what would be made from the table, or computed with it."""
        if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
            raise HalfbyteError(
                "An embedding in 4 bits takes plain LoRA alone, with init_lora_weights True or gaussian;"
                " load the model without quantize_embeddings."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Add the adapters to the dequantized table and quantize once; the codes are kept for `unmerge`.

        Those that are merged already are added anew to the first codes: what is rounded twice is further away.
        """
        base: Embedding4bit = self.get_base_layer()
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_embedding_A]
        if not new:
            return
        before = self._before_merge or base.quantized
        with torch.no_grad():
            table = before.dequantize(torch.float32)
            for name in (*self.merged_adapters, *new):
                table += self.get_delta_weight(name).float()
        base.quantized = quantize_like(table, before)
        self._before_merge = before
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """Restore the bits from before the first merge."""
        if self._before_merge is not None:
            self.get_base_layer().quantized = self._before_merge
            self._before_merge = None
            self.merged_adapters.clear()
