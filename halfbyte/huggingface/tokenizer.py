"""The tokenizer that a run uses: the model's, or the one saved with an adapter, with the chat template it was told."""

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from halfbyte.data import set_chat_template
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.load import load_tokenizer
from halfbyte.huggingface.source import reason


def prepare_tokenizer(
    model_name_or_path: str,
    adapter: str | None = None,
    chat_template: str | None = None,
    system_prompt: str | None = None,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; with an adapter the one it was saved with, so that prompts are what it learned from.

    Raises:
        HalfbyteError: there is none that can be read, or it cannot take the template (halfbyte.data.templates).
    """
    saved = None if adapter is None else tokenizer_saved_with(Path(adapter))
    tokenizer = load_tokenizer(model_name_or_path) if saved is None else saved
    set_chat_template(tokenizer, chat_template, system_prompt)
    return tokenizer


def tokenizer_saved_with(adapter: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside an adapter; for a checkpoint's the run's.  Raises HalfbyteError if it cannot be read."""
    places = [adapter, adapter.absolute().parent] if re.fullmatch(r"checkpoint-\d+", adapter.name) else [adapter]
    directory = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if directory is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers raise on files that they cannot read
        raise HalfbyteError(f"{directory} holds no tokenizer that can be read ({reason(error)}).") from error
