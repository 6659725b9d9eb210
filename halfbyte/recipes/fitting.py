"""Whether an adapter stands on the base that it was trained on.

Shapes and tokens that do not match are refused. What else differs is told in a sentence, and the work goes on: whoever
puts an adapter on a sibling of its base, or on a later version of it, may mean to.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import load_tokenizer
from halfbyte.huggingface.peft import load_adapter
from halfbyte.huggingface.tokenizer import tokenizer_saved_with
from halfbyte.recipes.provenance import Origin, quantization_of, read_origin, tokenizer_fingerprints

_SHORT = 12  # digits of a SHA-256 that a person compares


def put_on(
    model: PreTrainedModel | PeftModel, adapter: str, where: str, console: Console, name: str = "default"
) -> PeftModel:
    """Load an adapter onto a model, and say what differs from the base of its training.

    Args:
        where: the model, as the user named it.
        name: the adapter's, where there are several.

    Raises:
        HalfbyteError: whatever `load_adapter` refuses.
    """
    origin = read_origin(Path(adapter))
    found = None if origin.base_sha256 is None else weights_sha256(model)
    for sentence in base_differences(adapter, origin, where, quantization_of(model), found):
        warn(sentence, console)
    return load_adapter(model, adapter, name=name)


def warn(sentence: str, console: Console) -> None:
    console.print(f"warning: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def base_differences(
    adapter: Path | str, origin: Origin, where: str, quantization: dict[str, Any] | None, base_sha256: str | None
) -> list[str]:
    """Sentences on what the base of the training and this one do not have in common; none where nothing is known.

    Args:
        quantization: how this base is in 4 bits; None where that is the training's.
        base_sha256: `weights_sha256` of it; None where it was not, or cannot be, taken.
    """
    then = origin.quantization
    if then is not None and quantization is not None:
        keys = [key for key, value in quantization.items() if key in then and then[key] != value]
        if "quant_type" in keys or "none" in (then["quant_type"], quantization["quant_type"]):
            keys = [key for key in keys if key == "quant_type"]  # what else there is to it follows
        if keys:
            trained, found = (
                ", ".join(f"{key} {_written(side[key])}" for key in keys) for side in (then, quantization)
            )
            return [f"{adapter} was trained on a base with {trained}, and {where} is loaded with {found}."]
    if base_sha256 is not None and origin.base_sha256 not in (None, base_sha256):
        named = f" ({origin.base_name})" if origin.base_name else ""
        return [
            f"{adapter} was trained on other weights{named} than those of {where}: their SHA-256"
            f" was {str(origin.base_sha256)[:_SHORT]}… and is {base_sha256[:_SHORT]}…"
        ]
    return []


def check_tokenizer(adapter: Path | str, model_name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside an adapter, which has the tokens of the base's; None where there is none.

    Raises:
        HalfbyteError: the adapter was trained with other tokens, or other numbers for them; one cannot be read.
    """
    saved, own = tokenizer_saved_with(Path(adapter)), load_tokenizer(model_name_or_path)
    origin = read_origin(Path(adapter))
    if saved is not None:
        differs = saved.get_vocab() != own.get_vocab()
    else:
        told = (origin.tokenizer or {}).get("vocabulary_sha256")
        differs = told is not None and told != tokenizer_fingerprints(own)["vocabulary_sha256"]
    if differs:
        named = f" ({origin.base_name})" if origin.base_name else ""
        raise HalfbyteError(
            f"{adapter} was trained with another tokenizer than that of {model_name_or_path}, which has {len(own):,}"
            f" tokens; name the base it was trained on{named}."
        )
    return saved


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
