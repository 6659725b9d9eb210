"""Text from a model, by transformers' own generation; a single prompt by the fast decoder where there is one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation import GenerationMode

from halfbyte.data.masks import turn_end_ids
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.decode import fast_decoder


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without special tokens; greedy at temperature 0.

    Args:
        prompts: already rendered by the tokenizer's chat template, if it has one, or the ids of that, which are used
            as they are. Generated as one batch, padded on the left.
        stream: called with each piece of the text as it is written; for a single prompt.
    """
    model.eval()
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    pad = _pad_token_id(tokenizer)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    streamer = _Streamer(tokenizer, stream) if stream else None
    single = len(prompts) == 1
    with nullcontext() if single else _last_positions_together(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=_end_token_ids(model, tokenizer),
            streamer=streamer,
            **(sampling if temperature else {**sampling, "temperature": None, "top_p": None, "top_k": None}),
            **(_fast_decoding(model, width + max_new_tokens, streamer) if single else {}),
        )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in output[:, width:]]


@contextmanager
def _last_positions_together(model: PreTrainedModel) -> Iterator[None]:
    """Hand the output layer a copy of what it reads of a batch: each row's last position.

    A slice of all positions torch takes for a batch of matrices, and copies the layer's weight for each row of it:
    2.2 GB for 40 rows of SmolLM2-135M.
    """
    output_layer = model.get_output_embeddings()
    if output_layer is None:
        yield
        return
    hook = output_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # A template writes the beginning-of-text token itself; without one the text begins as it does in training.
    begins = [] if tokenizer.chat_template else tokenizer("")["input_ids"][:1]
    if begins and begins == [tokenizer.bos_token_id]:
        ids = begins + ids
    if not ids:
        raise HalfbyteError("The prompt is empty: there is nothing to go on from.")
    return ids


def _fast_decoding(model: PreTrainedModel, longest: int, streamer: TextStreamer | None) -> dict[str, Any]:
    """The arguments of `model.generate` for the fast decoder; none where it cannot do what would be done."""
    settings = model.generation_config
    # A function of ours takes the place of whatever way of searching the model's own settings ask for.
    one_by_one = settings.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    if not one_by_one or settings.return_dict_in_generate:
        return {}
    decoder = fast_decoder(model)
    if decoder is None or (decoder.longest is not None and longest > decoder.longest):
        return {}
    # transformers keeps the streamer from a function of ours, but for the prompt.
    return {"custom_generate": partial(decoder.generate, streamer=streamer)}


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


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The model's own, the tokenizer's, and what the chat template ends an answer with: an adapter has learned that."""
    own = model.generation_config.eos_token_id
    ids = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *turn_end_ids(tokenizer)} - {None}
    return sorted(ids) or None
