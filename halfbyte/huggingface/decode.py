"""Fast decoding of one sequence: transformers reads the prompt, and `ops.decode_token` takes it from there.

A model is taken for a Llama when its modules are those of one and nothing else, and when it then says what the model
itself says: scales, caps and norms that a name does not show would show in the logits. Everything else is None, and
is left to transformers: other architectures, layers that are not in 4 bits, hooks, adapters other than one plain LoRA.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from halfbyte.huggingface.peft import LoraLinear4bit
from halfbyte.nn import Linear4bit
from halfbyte.ops import DecodeLayer, DecodeLinear, DecodeModel, Nested, decode_token
from halfbyte.quant import DoubleQuantized, codebook_8bit

# Children of a layer and what is below it; a router or a third norm makes it another architecture.
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}  # Qwen3's, which others do not have
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rotations that depend on the position alone. The others change with the length of the sequence.
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
_FIRST_CAPACITY = 512
# Of the logits' deviation, the root mean square of the difference at the median step. Two roundings of one bfloat16
# model differ by 0.01 to 0.05 (and now and then, at a token that tips over, by 0.3); half of one layer's attention
# gone makes it 0.15 to 0.5.
_TOLERANCE = 0.1

_verified: WeakKeyDictionary[PreTrainedModel, tuple[str, ...]] = WeakKeyDictionary()  # with which active adapters


class Decoder:
    """The tokens of one sequence so far: their keys and values, in memory that grows by doubling."""

    def __init__(self, model: PreTrainedModel, compiled: DecodeModel, capacity: int = _FIRST_CAPACITY) -> None:
        self.longest: int | None = getattr(model.config, "sliding_window", None)  # tokens that all see each other
        self.length = 0
        self._model = model
        self._compiled = compiled
        shape = (len(compiled.layers), compiled.kv_heads, capacity, compiled.head_dim)
        self._keys, self._values = torch.zeros(2, *shape, dtype=torch.bfloat16)
        self._rotate()

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Begin anew with a prompt `(1, length)`; `(vocabulary,)` float32 logits of what follows it."""
        output = self._model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        self.length = 0
        self._reserve(input_ids.shape[1])
        for index, layer in enumerate(output.past_key_values.layers):
            self._keys[index, :, : input_ids.shape[1]] = layer.keys[0]
            self._values[index, :, : input_ids.shape[1]] = layer.values[0]
        self.length = input_ids.shape[1]
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def step(self, token: int) -> Tensor:
        """Append a token; `(vocabulary,)` float32 logits of what follows it."""
        self._reserve(self.length + 1)
        position = self.length
        cos, sin = self._cos[position], self._sin[position]
        logits = decode_token(self._compiled, token, cos, sin, self._keys, self._values, position)
        self.length += 1
        return logits

    def generate(
        self,
        _model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **_kwargs: object,
    ) -> Tensor:
        """What `model.generate(custom_generate=...)` calls: it prepared how to choose a token and when to stop."""
        logits = self.prefill(input_ids)
        while True:
            scores = logits_processor(input_ids, logits[None])
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, token), dim=1)
            if streamer is not None:
                streamer.put(token[0])
            if stopping_criteria(input_ids, scores).all():
                break
            logits = self.step(int(token))
        if streamer is not None:
            streamer.end()
        return input_ids

    def _reserve(self, length: int) -> None:
        capacity = self._keys.shape[2]
        if length > capacity:
            room = max(length, 2 * capacity) - capacity
            self._keys, self._values = (F.pad(cache, (0, 0, 0, room)) for cache in (self._keys, self._values))
            self._rotate()

    def _rotate(self) -> None:
        positions = torch.arange(self._keys.shape[2])[None]
        cos, sin = self._model.model.rotary_emb(torch.empty(0, dtype=torch.float32), positions)
        self._cos, self._sin = cos[0], sin[0]


def fast_decoder(model: PreTrainedModel | PeftModel) -> Decoder | None:
    """A decoder of the model as it is now, or None where `ops.decode_token` is not what the model computes.

    Adapters are copied, other weights shared: make a new one after training. The first call for a model compares the
    logits of a few steps with the model's own.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.training or base.device.type != "cpu" or base.dtype != torch.bfloat16:
        return None
    if not all(_is_untouched(module) for module in base.modules()):
        return None
    compiled = _compile(base)
    if compiled is None:
        return None
    decoder = Decoder(base, compiled)
    adapters = tuple(model.active_adapters) if isinstance(model, PeftModel) else ()
    if _verified.get(base) != adapters:
        if not _agrees(decoder, base):
            return None
        _verified[base] = adapters
    return decoder


@torch.no_grad()
def _agrees(decoder: Decoder, model: PreTrainedModel) -> bool:
    tokens = torch.randint(model.config.vocab_size, (1, 15), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits[0].float()
    decoder.prefill(tokens[:, :4])  # the model's own
    got = torch.stack([decoder.step(int(token)) for token in tokens[0, 4:]])
    difference = (got - expected[4:]).square().mean(-1).sqrt() / expected[4:].std(-1)
    return bool(difference.median() <= _TOLERANCE)  # false for NaN


def _compile(model: PreTrainedModel) -> DecodeModel | None:
    """The tensors of a Llama, or None where the modules are not those of one."""
    stack: Any = getattr(model, "model", None)
    head: Any = getattr(model, "lm_head", None)
    if _children(model) != {"model", "lm_head"} or _children(stack) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return None
    if (type(head), type(stack.embed_tokens)) != (nn.Linear, nn.Embedding) or head.bias is not None:
        return None
    layers = [_layer(layer) for layer in stack.layers]
    found = tuple(layer for layer in layers if layer is not None)
    epsilons = {_epsilon(module) for module in stack.modules() if "norm" in type(module).__name__.lower()}
    scales = {getattr(layer.self_attn, "scaling", None) for layer in stack.layers}
    shapes = {tuple(part.shape for part in layer if isinstance(part, DecodeLinear)) for layer in found}
    if len(found) != len(layers) or any(len(values) != 1 for values in (epsilons, scales, shapes)):
        return None
    epsilon, scale = epsilons.pop(), scales.pop()
    if epsilon is None or scale is None:
        return None
    inv_freq = getattr(stack.rotary_emb, "inv_freq", None)
    rope_type = getattr(stack.rotary_emb, "rope_type", None)
    head_dim = getattr(stack.layers[0].self_attn, "head_dim", 0)
    if rope_type not in _ROPE_TYPES or inv_freq is None or 2 * inv_freq.numel() != head_dim:
        return None
    if any(weight.dtype != torch.bfloat16 for weight in (head.weight, stack.embed_tokens.weight)):
        return None
    return DecodeModel(
        layers=found,
        final_norm=stack.norm.weight.detach().float(),
        embedding=stack.embed_tokens.weight.detach(),
        head=head.weight.detach(),
        heads=found[0].query.shape[0] // head_dim,
        kv_heads=found[0].key.shape[0] // head_dim,
        head_dim=head_dim,
        epsilon=epsilon,
        attention_scale=scale,
    )


def _layer(layer: Any) -> DecodeLayer | None:
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    if _children(attention) == _ATTENTION | _HEAD_NORMS:
        query_norm, key_norm = (norm.weight.detach().float() for norm in (attention.q_norm, attention.k_norm))
    elif _children(attention) != _ATTENTION:
        return None
    if any(norm is not None and norm.shape != (attention.head_dim,) for norm in (query_norm, key_norm)):
        return None  # over all heads together
    if "silu" not in type(mlp.act_fn).__name__.lower():
        return None
    modules = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    linears = [_linear(module) for module in modules]
    found = [linear for linear in linears if linear is not None]
    if len(found) < len(linears):
        return None
    attention_norm, mlp_norm = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
    query, key, value, output, gate, up, down = found
    norms = attention_norm.float(), mlp_norm.float()
    return DecodeLayer(*norms, query, key, value, output, gate, up, down, query_norm, key_norm)


def _linear(module: Any) -> DecodeLinear | None:
    lora = None
    if type(module) is LoraLinear4bit:
        adapters = [name for name in module.active_adapters if name in module.lora_A]
        if adapters and not module.disable_adapters and not module.merged:
            adapter = module.plain_adapter()
            if adapter is None:
                return None
            lora_A, lora_B = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
            padding = -len(lora_A) % 16
            lora_A = F.pad(lora_A, (0, 0, 0, padding)).bfloat16()
            lora_B = F.pad(lora_B * module.scaling[adapter], (0, padding)).bfloat16()
            lora = lora_A, lora_B
        module = module.get_base_layer()
    if type(module) is not Linear4bit or module.compute_dtype != torch.bfloat16:
        return None
    weight, nested = module.quantized, None
    absmax = weight.absmax
    if isinstance(absmax, DoubleQuantized):
        nested = Nested(absmax.absmax, codebook_8bit(absmax.codes.device), absmax.offset)
        absmax = absmax.codes
    bias = None if module.bias is None else module.bias.detach().float()
    rows, columns = weight.shape
    packed = weight.packed.detach()
    return DecodeLinear(packed, absmax, nested, weight.codebook, weight.block_size, (rows, columns), bias, lora)


def _is_untouched(module: nn.Module) -> bool:
    """Whether it computes what its class does: no hook and no forward of its own but halfbyte's."""
    forward = vars(module).get("forward")
    own = () if forward is None else (forward,)
    added = (*own, *module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(hasattr(function, "halfbyte_name") for function in added)


def _children(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()} if isinstance(module, nn.Module) else set()


def _epsilon(norm: nn.Module) -> float | None:
    value: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return value
