"""The fast decoder: what the model itself would say, or None."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.huggingface import add_lora, load_model
from halfbyte.huggingface import decode as module
from halfbyte.huggingface.decode import Decoder, fast_decoder
from halfbyte.huggingface.generate import _fast_decoding, generate_texts
from halfbyte.nn import Linear4bit
from models import build_model, build_tokenizer

PROMPT = "tell me"


def quantized(model_type: str, **settings: object) -> PreTrainedModel:
    model = build_model(model_type, **settings)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, Linear4bit.from_linear(layer))
    return model


def with_lora(model: PreTrainedModel, **settings: object) -> peft.PeftModel:
    adapted = add_lora(model, peft.LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


SUPPORTED = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "odd head": ("llama", {"head_dim": 10, "num_key_value_heads": 1}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def assert_no_further_from_float32(model: PreTrainedModel, decoder: Decoder, tokens: Tensor) -> None:
    """Logits of a few steps; the model is left in float32, where its Linear4bit compute too."""
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits[0, 3:].float()
        ours = torch.stack([decoder.prefill(tokens[:, :4]), *(decoder.step(int(t)) for t in tokens[0, 4:])])
        exact = in_float32(model)(input_ids=tokens).logits[0, 3:]
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_no_further_from_float32_than_the_model_is(name: str, lora: bool) -> None:
    model_type, settings = SUPPORTED[name]
    model = quantized(model_type, **settings)
    adapted = with_lora(model) if lora else model
    decoder = fast_decoder(adapted)
    assert decoder is not None
    assert_no_further_from_float32(model, decoder, torch.randint(250, (1, 40)))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "phi3", "granite", "gpt2", "opt", "mixtral"])
def test_another_architecture_is_none_and_its_text_transformers(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = quantized(model_type), build_tokenizer()
    assert fast_decoder(model) is None
    (text,) = generate_texts(model, tokenizer, [PROMPT], 8)
    monkeypatch.setattr("halfbyte.huggingface.generate.fast_decoder", lambda _: None)
    assert [text] == generate_texts(model, tokenizer, [PROMPT], 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.float(),
        lambda model: model.set_submodule("model.layers.1.mlp.up_proj", torch.nn.Linear(32, 56, bias=False).bfloat16()),
        lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"),
        lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.GELU()),
        lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1),
        lambda model: model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _m, _x, y: y * 0.5),
    ],
    ids=["training", "float32", "16-bit layer", "rope", "gelu", "scale", "hook"],
)
def test_what_is_not_quite_a_llama_is_none(change: object) -> None:
    model = quantized("llama")
    assert callable(change)
    change(model)
    assert fast_decoder(model) is None


def test_layers_of_different_sizes_are_none() -> None:
    model = quantized("llama")
    model.model.layers[1].mlp = quantized("llama", intermediate_size=40).model.layers[1].mlp
    # Before any comparison of logits: the kernel would read behind the narrower layer.
    assert module._compile(model) is None


def test_what_is_changed_after_a_first_text_is_seen() -> None:
    model = quantized("llama")
    assert fast_decoder(model) is not None
    hook = model.model.layers[1].mlp.register_forward_hook(lambda _m, _x, y: y)
    assert fast_decoder(model) is None
    hook.remove()
    assert fast_decoder(model) is not None
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward
    assert fast_decoder(model) is None


def test_a_disabled_adapter_is_the_base_and_two_are_none() -> None:
    assert fast_decoder(with_lora(quantized("llama"), use_rslora=True)) is not None
    model = quantized("llama")
    adapted, tokens = with_lora(model), torch.randint(250, (1, 6))
    base = fast_decoder(quantized("llama"))
    assert base is not None
    with adapted.disable_adapter():
        off = fast_decoder(adapted)
        assert off is not None
        assert torch.equal(off.prefill(tokens), base.prefill(tokens))
        assert torch.equal(off.step(3), base.step(3))
    adapted.add_adapter("second", peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert fast_decoder(adapted) is not None  # there, but not active
    adapted.base_model.set_adapter(["default", "second"])
    assert fast_decoder(adapted.eval()) is None


def test_the_cache_grows() -> None:
    model = quantized("llama")
    decoder = fast_decoder(model)
    assert decoder is not None
    small = Decoder(model, decoder._compiled, capacity=3)
    tokens = torch.randint(250, (1, 5))
    assert torch.equal(small.prefill(tokens), decoder.prefill(tokens))
    for token in range(40):
        assert torch.equal(small.step(token), decoder.step(token))


def by_both(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> tuple[str, str, int]:
    """The text of the fast decoder, that of transformers, and how many steps the former took."""
    steps = 0
    step = Decoder.step

    def counted(self: Decoder, token: int) -> Tensor:
        nonlocal steps
        steps += 1
        return step(self, token)

    monkeypatch.setattr(module.Decoder, "step", counted)
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    (ours,) = generate_texts(model, tokenizer, [PROMPT], 12)
    monkeypatch.setattr("halfbyte.huggingface.generate.fast_decoder", lambda _: None)
    torch.manual_seed(1)
    (theirs,) = generate_texts(model, tokenizer, [PROMPT], 12)
    return ours, theirs, steps


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, computing in float32 from here on."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.float32
    return torch.nn.Module.float(model)  # transformers refuses to cast a model that is quantized


@torch.no_grad()
def assert_apart_only_at_a_tie(model: PreTrainedModel, prompts: list[Tensor], count: int) -> None:
    """Greedy tokens are transformers'. Where they part, the model's two candidates must lie nearer to each other in
    float32 than twice the largest error of its own bfloat16 logits there: it cannot tell them apart itself."""
    texts = []
    for prompt in prompts:
        decoder = fast_decoder(model)
        assert decoder is not None
        settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ours = model.generate(input_ids=prompt, custom_generate=decoder.generate, **settings)[0]
        theirs = model.generate(input_ids=prompt, **settings)[0]
        assert len(ours) == len(theirs) == prompt.shape[1] + count
        differs = (ours != theirs).nonzero()
        if len(differs):
            at = int(differs[0])
            logits = model(input_ids=theirs[None, :at]).logits[0, -1].float()
            texts.append((theirs[:at], int(ours[at]), int(theirs[at]), logits))
    exact = in_float32(model)
    for before, our_token, their_token, logits in texts:
        judge = exact(input_ids=before[None]).logits[0, -1]
        assert (judge[our_token] - judge[their_token]).abs() <= 2 * (logits - judge).abs().max()


@pytest.mark.parametrize("name", SUPPORTED)
def test_greedy_tokens(name: str) -> None:
    model_type, settings = SUPPORTED[name]
    assert_apart_only_at_a_tie(quantized(model_type, **settings), list(torch.randint(250, (3, 1, 7))), 24)


def test_greedy_tokens_of_the_real_model(smollm2_directory: Path) -> None:
    model, tokenizer = load_model(str(smollm2_directory))
    prompts = ("The capital of France is", "def fibonacci(n):", "Once upon a time", "Water boils at", "1, 2, 3, 4,")
    assert_apart_only_at_a_tie(model, [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts], 64)


def test_sampling_is_seeded_and_obeys_its_settings() -> None:
    model, tokenizer = quantized("llama"), build_tokenizer()

    def sample(seed: int, **settings: float) -> str:
        torch.manual_seed(seed)
        (text,) = generate_texts(model, tokenizer, [PROMPT], 12, **settings)
        return text

    assert sample(1, temperature=0.7, top_p=0.9) == sample(1, temperature=0.7, top_p=0.9)
    assert len({sample(seed, temperature=1.5) for seed in range(6)}) > 1
    assert sample(1, temperature=0.7, top_p=1e-6) == sample(2)  # of the likeliest token alone: greedy


@pytest.mark.parametrize(
    "change",
    [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"return_dict_in_generate": True}],
    ids=lambda change: next(iter(change)),
)
def test_another_way_to_search_is_left_to_transformers(change: dict[str, object]) -> None:
    model = quantized("llama")
    assert _fast_decoding(model, 20, None)
    model.generation_config.update(**change)
    assert not _fast_decoding(model, 20, None)


def test_a_penalty_of_the_models_own_settings_holds() -> None:
    model = quantized("llama")
    model.generation_config.repetition_penalty = 1e9
    ids = torch.randint(250, (1, 4))
    decoder = fast_decoder(model)
    assert decoder is not None
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(input_ids=ids, custom_generate=decoder.generate, **settings)[0, 4:]
    assert len(written.unique()) == len(written) == 24


def test_a_batch_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = quantized("llama"), build_tokenizer()
    fast_decoder(model)  # its check takes steps
    monkeypatch.setattr(Decoder, "step", None)
    assert len(generate_texts(model, tokenizer, [PROMPT, PROMPT + " more"], 4)) == 2


def test_a_window_that_is_too_short_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("mistral", sliding_window=16)
    fast_decoder(model)  # its check takes steps
    ours, theirs, steps = by_both(monkeypatch, model)
    assert ours == theirs
    assert steps == 0


def test_streams_and_stops() -> None:
    model, tokenizer = quantized("llama"), build_tokenizer()
    pieces: list[str] = []
    (text,) = generate_texts(model, tokenizer, [PROMPT], 12, stream=pieces.append)
    assert "".join(pieces) == text
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    decoder = fast_decoder(model)
    assert decoder is not None
    first = int(decoder.prefill(ids).argmax())
    model.generation_config.eos_token_id = [first, tokenizer.eos_token_id]
    (stopped,) = generate_texts(model, tokenizer, [PROMPT], 12)
    assert stopped == tokenizer.decode([first], skip_special_tokens=True)
