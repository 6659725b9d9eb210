"""Text from a model, by transformers' own generation."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without special tokens; greedy at temperature 0.

    Args:
        prompts: already rendered by a template, with its beginning-of-text token if it has one. Generated as
            one batch, padded on the left.
        stream: called with each piece of the text as it is written; for a single prompt.
    """
    model.eval()
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    pad = _pad_token_id(tokenizer)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        streamer=_Streamer(tokenizer, stream) if stream else None,
        **(sampling if temperature else {**sampling, "temperature": None, "top_p": None, "top_k": None}),
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in output[:, width:]]


class _Streamer(TextStreamer):  # type: ignore[misc]
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        self._write(text)


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Which id it is does not matter, since the attention mask hides it.
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
