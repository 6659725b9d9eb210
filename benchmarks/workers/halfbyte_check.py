"""halfbyte: the numbers that the correctness gate compares, each written to a safetensors file.

The orchestrator runs this worker with and without HALFBYTE_IMPLEMENTATION=reference, and in float32: what is asked
and answered is the same, only who computes it differs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from halfbyte_model import executed, load, put_adapters_on, supervise_all, write_greedily
from peft import PeftModel
from protocol import Measure, Reply, Request, serve
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import halfbyte as hb
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.data import encode_rows, read_rows, training_steps
from halfbyte.nn import count_supervised, supervised_loss
from halfbyte.recipes.training import train_step


def prepare(settings: Request) -> tuple[Measure, Reply]:
    checks = {"step": _step, "decode": _decode, "written": _written, "judged": _judged, "curve": _curve}

    def measure(request: Request) -> Reply:
        model, tokenizer = load(settings)
        weights = weights_sha256(model)
        tensors = checks[request["check"]](model, tokenizer, request)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, request["path"])
        return {"implementation": executed(), "weights": weights}

    return measure, {}


def _step(base: PreTrainedModel, tokenizer: Any, request: Request) -> dict[str, Tensor]:
    """The loss of every position, the loss that is trained on, and the gradient of every adapter."""
    model = put_adapters_on(base)
    _draw_second_factors(model)
    ids = _tokens(model, tokenizer, request, rows=2, length=128)
    batch = supervise_all(ids)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    model.train()
    loss = supervised_loss(model, batch) / count_supervised(batch)
    loss.backward()
    gradients = {f"grad.{name}": p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"token_losses": losses, "loss": loss.detach().float().reshape(1), **gradients}


def _draw_second_factors(model: PeftModel) -> None:
    # lora_B starts at zero, and then lora_A has no gradient that could be wrong.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


@torch.no_grad()
def _decode(model: PreTrainedModel, tokenizer: Any, request: Request) -> dict[str, Tensor]:
    """Logits after a prompt, and after each of some fixed tokens fed one by one, as decoding does."""
    prompt, rest = _tokens(model, tokenizer, request, rows=1, length=64).split([48, 16], dim=1)
    output = model(input_ids=prompt, use_cache=True)
    logits = [output.logits[0, -1]]
    for token in rest.T:
        output = model(input_ids=token[None], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0, -1])
    return {"logits": torch.stack(logits).float()}


def _written(model: PreTrainedModel, tokenizer: Any, request: Request) -> dict[str, Tensor]:
    """What is written after a prompt, greedily."""
    return {"ids": torch.tensor(write_greedily(model, tokenizer, request["prompt"], request["new_tokens"]))}


@torch.no_grad()
def _judged(model: PreTrainedModel, tokenizer: Any, request: Request) -> dict[str, Tensor]:
    """Logits for what somebody wrote after a prompt: at each of its tokens, those that it was chosen from."""
    prompt = tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + request["ids"]])
    return {"logits": model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()}


def _curve(base: PreTrainedModel, tokenizer: Any, request: Request) -> dict[str, Tensor]:
    """The losses of a short training run; a seed decides the first adapters and the order of the rows."""
    model = put_adapters_on(base, seed=request["seed"])
    optimizer = hb.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    examples, _ = encode_rows(tokenizer, list(read_rows(request["rows"], "alpaca")), request["length"])
    losses = [
        train_step(model, optimizer, batches, 1e-3, 0.3, torch.device("cpu"))["loss"]
        for _, batches in zip(range(request["steps"]), _steps(examples, tokenizer, request), strict=False)
    ]
    return {"losses": torch.tensor(losses, dtype=torch.float32)}


def _steps(examples: Any, tokenizer: Any, request: Request) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from training_steps(
            examples,
            seed=request["seed"],
            epoch=epoch,
            per_device_train_batch_size=request["batch"],
            gradient_accumulation_steps=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        epoch += 1


def _tokens(model: Any, tokenizer: Any, request: Request, rows: int, length: int) -> Tensor:
    """(rows, length) of English, `part` says which; random ids for a random model with a smaller vocabulary."""
    # On tokens that make no sense a trained model's gradient in bf16 is mostly rounding, whoever computes it.
    count = rows * length
    if len(tokenizer) > model.config.vocab_size:
        generator = torch.Generator().manual_seed(request["part"])
        return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    ids = tokenizer(Path(request["text"]).read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[request["part"] * count :][:count]).view(rows, length)


if __name__ == "__main__":
    serve(prepare)
