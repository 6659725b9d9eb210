"""One answer to one prompt."""

from collections.abc import Callable

import torch
from rich.console import Console

from halfbyte.data import render_chat
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import load_model, prepare_tokenizer
from halfbyte.huggingface.generate import generate_texts
from halfbyte.huggingface.peft import read_adapter_config
from halfbyte.recipes.fitting import check_tokenizer, put_on


def generate(
    model_name_or_path: str,
    prompt: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    chat_template: str | None = None,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    stream: Callable[[str], None] | None = None,
    console: Console | None = None,
) -> str:
    """Answer a prompt in the chat template of the adapter or the model; go on with it where there is none; greedy at 0.

    Raises:
        HalfbyteError: whatever `load_model` and `load_adapter` refuse; an adapter of another tokenizer; a system
            message without a template.
    """
    if adapter is not None:  # before the model is loaded, which takes its time
        read_adapter_config(adapter)
        check_tokenizer(adapter, model_name_or_path)
    tokenizer = prepare_tokenizer(model_name_or_path, adapter, chat_template)
    model, _ = load_model(model_name_or_path, quant_type, block_size, double_quant, getattr(torch, compute_dtype))
    if adapter is not None:
        model = put_on(model, adapter, model_name_or_path, console or Console(stderr=True))
    messages = [{"role": "system", "content": system}] if system else []
    if tokenizer.chat_template:
        messages.append({"role": "user", "content": prompt})
        prompt = render_chat(tokenizer, messages, "the prompt", add_generation_prompt=True)
    elif system:
        raise HalfbyteError(
            f"{model_name_or_path} has no chat template, so no place for a system message; set chat_template, or"
            " leave it out."
        )
    torch.manual_seed(seed)
    (answer,) = generate_texts(model, tokenizer, [prompt], max_new_tokens, temperature, top_p, stream)
    return answer
