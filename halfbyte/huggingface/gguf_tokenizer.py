"""A tokenizer in the words of GGUF, and GGUF's words for what a tokenizer does before it looks tokens up.

llama.cpp has two tokenizers for what these models have. Byte-level BPE (`gpt2`): tokens spelt in the byte alphabet,
merges, and a name for how text is split first (`tokenizer.ggml.pre`), which stands for regular expressions in its
source. SentencePiece's BPE (`llama`): no merges but scores, the higher the earlier, with tokens for single bytes.

transformers reads a file's tokenizer, but not all names of splits: those that it does not know it takes for GPT-2's.
"""

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata

from halfbyte.data.masks import turn_end_ids
from halfbyte.data.templates import begins_with_bos
from halfbyte.errors import HalfbyteError

# Digits one by one, then GPT-2's expression.
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_UNUSED = "[PAD{}]"  # llama.cpp's name for a row of the embedding that no token has
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_OF_PHI_3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_SPECIAL_IDS = ("bos", "eos", "unk", "pad", "sep", "mask")

Steps = tuple[tuple[Any, ...], ...]  # what is done to a text, one after another


def write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> list[str]:
    """The tokenizer under GGUF's keys; notes of what llama.cpp does otherwise.

    Args:
        rows: of the embedding. Tokens without a row are left out, rows without a token are named as unused.

    Raises:
        HalfbyteError: it is of a kind, or splits text in a way, that GGUF has no words for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise HalfbyteError(f"{where}: a tokenizer in Python ({type(tokenizer).__name__}) cannot be written as GGUF.")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise HalfbyteError(f"{where}: a tokenizer of the kind {model['type']} cannot be written as GGUF; BPE can.")
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [vocabulary.get(index, _UNUSED.format(index)) for index in range(rows)]
    writer_notes = (
        _write_sentencepiece(writer, parts, tokens, backend)
        if model["byte_fallback"]
        else _write_byte_level(writer, parts, tokens, where)
    )
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_types(_token_types(parts, vocabulary, tokens))
    write_special_tokens(writer, tokenizer, rows)
    write_chat_template(writer, tokenizer)
    if parts["normalizer"] is not None and "NF" in json.dumps(parts["normalizer"]):
        writer_notes.append("the tokenizer composes accents written in two signs, which llama.cpp leaves as they are")
    return writer_notes


def write_special_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """The tokens with a meaning, what an answer ends with, and whether a text begins with one.

    A token that transformers adds to each tokenizer of a class, and that the model has no row for, is left out.
    """
    for name in _SPECIAL_IDS:
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None and index < rows:
            getattr(writer, f"add_{name}_token_id")(index)
    ends = turn_end_ids(tokenizer)
    if ends and ends[-1] != tokenizer.eos_token_id:  # the first that an answer would be ended with
        writer.add_eot_token_id(ends[-1])
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    last = tokenizer("a", add_special_tokens=True)["input_ids"][-1]
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and last == tokenizer.eos_token_id)


def write_chat_template(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's chat template, or all of them where it has several; nothing where it has none."""
    if isinstance(tokenizer.chat_template, dict):
        writer.add_chat_template([{"name": name, "template": t} for name, t in tokenizer.chat_template.items()])
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def name_for_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The model's name such that llama.cpp reads Phi-3's tokens as transformers does, and those of others too.

    After Phi-3's control tokens spaces are passed over. llama.cpp knows it by the name, and cannot open a file of that
    name without those tokens.
    """
    added = tokenizer.added_tokens_decoder.values()
    strips = any(token.special and token.rstrip for token in added)
    if strips and tokenizer.get_vocab().keys() >= _OF_PHI_3:
        return name if _PHI_3.search(name) else f"phi-3 {name}"
    return _PHI_3.sub("phi_3", name)


def read_as_llama_cpp(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Have a tokenizer that transformers made of a .gguf file take text apart as llama.cpp does, where it does not.

    transformers does not know all names of splits, and a space that SentencePiece puts in front of a text it puts in
    front of the first part alone, and not where one is already.
    """
    metadata, _ = read_gguf_metadata(str(file))
    backend, kind = tokenizer.backend_tokenizer, metadata.get("tokenizer.ggml.model")
    if kind == "gpt2" and metadata.get("tokenizer.ggml.pre") in _DIGITS_ALONE:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif kind == "llama" and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        prepend = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None


def split_name(parts: dict[str, Any], where: str) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text.

    Args:
        parts: of tokenizer.json.

    Raises:
        HalfbyteError: it has none.
    """
    expression = next((step[1] for step in _steps(parts["pre_tokenizer"]) if step[0] == "split"), None)
    plain = (("bytes", False, True),)
    known: dict[Steps, str] = {plain: "gpt-2", (("digits", True), *plain): "smollm"}
    for name, ignores_merges in (("llama-bpe", True), ("smaug-bpe", False), ("qwen2", False), ("tekken", True)):
        if ignores_merges == bool(parts["model"].get("ignore_merges")):
            known[("split", GGUF_PRE_TOKENIZER_SPLITS[name]), ("bytes", False, False)] = name
    known[("split", GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]), ("bytes", False, False)] = "gpt-4o"
    found = known.get(_steps(parts["pre_tokenizer"]))
    if found is None:
        how = f"by {expression[:60]!r}…" if expression else f"by {json.dumps(parts['pre_tokenizer'])[:80]}"
        raise HalfbyteError(f"{where}: the tokenizer splits text {how}, which llama.cpp has no name for.")
    return found


def _steps(pre_tokenizer: dict[str, Any] | None) -> Steps:
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel":
        return (("bytes", pre_tokenizer["add_prefix_space"], pre_tokenizer["use_regex"]),)
    if kind == "Digits":
        return (("digits", pre_tokenizer["individual_digits"]),)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated":
        return (("split", pre_tokenizer["pattern"].get("Regex")),)
    return ((kind,),)


def _write_byte_level(writer: GGUFWriter, parts: dict[str, Any], tokens: list[str], where: str) -> list[str]:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(parts, where))
    there = set(tokens)
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in parts["model"]["merges"]]
    writer.add_token_merges([f"{a} {b}" for a, b in pairs if a + b in there])
    return []


def _write_sentencepiece(writer: GGUFWriter, parts: dict[str, Any], tokens: list[str], backend: Tokenizer) -> list[str]:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    earliest: dict[str, int] = {}
    for rank, pair in enumerate(parts["model"]["merges"]):
        a, b = pair.split(" ") if isinstance(pair, str) else pair
        earliest.setdefault(a + b, rank)
    lowest = -float(len(parts["model"]["merges"]) + 1)  # of what no merge makes: letters, bytes
    writer.add_token_scores([-float(earliest[token]) if token in earliest else lowest for token in tokens])
    at_start = backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
    writer.add_add_space_prefix(at_start)
    special = next((token["content"] for token in parts["added_tokens"] if token["special"]), None)
    if special is None or not at_start:
        return []
    after = backend.encode(f"{special}a", add_special_tokens=False).tokens[-1].startswith("▁")
    return [] if after else ["llama.cpp puts a space after a special token, where this tokenizer puts none"]


def _token_types(parts: dict[str, Any], vocabulary: dict[int, str], tokens: list[str]) -> list[TokenType]:
    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    unknown = parts["model"].get("unk_token")
    types = []
    for index, token in enumerate(tokens):
        if index not in vocabulary:
            types.append(TokenType.UNUSED)
        elif token == unknown:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index] else TokenType.USER_DEFINED)
        elif parts["model"]["byte_fallback"] and _BYTE.fullmatch(token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return types
