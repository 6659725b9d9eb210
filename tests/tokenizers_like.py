"""Small tokenizers of the two kinds that GGUF has, with merges: SentencePiece's BPE, and BPE over bytes."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

TEXT = (
    "the model reads a text and writes another text; the other text is what the reader of the model wanted to read"
    " when the time had come, in the town, on the hill, at the mill, and then there were three"
)


def build_sentencepiece_like(
    chat_template: str | None,
    specials: tuple[str, ...],
    prefix: bool = True,
    names: tuple[str, str, str] = ("<unk>", "<s>", "</s>"),
) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral, Gemma and Phi-3 have it: over ▁ and letters, with tokens for single bytes.

    Its merges are what follows from its scores, as in files that were made from sentencepiece's.

    Args:
        specials: after those of `names`: for what is unknown, the beginning and the end of a text.
        prefix: whether a text begins with a space that is not there, as Llama's does and Gemma's does not.
    """
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(set(TEXT.replace(" ", "▁")))
    words = sorted({f"▁{word}" for word in TEXT.split()}, key=lambda word: (len(word), word))
    parts = {word[:end] for word in words for end in range(2, len(word) + 1)}
    parts |= {word[begin:end] for word in words for begin in range(len(word)) for end in (begin + 2, begin + 3)}
    longer = sorted((part for part in parts if len(part) > 1), key=lambda part: (len(part), part))
    tokens = [*names, *pieces, *longer, *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = {token: -float(index) for token, index in vocabulary.items()}
    merges = generate_merges({token: vocabulary[token] for token in (*longer, *letters)}, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=names[0], byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    added = [AddedToken(token, special=True, normalized=False) for token in (*names, *specials)]
    tokenizer.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        unk_token=names[0],
        bos_token=names[1],
        eos_token=names[2],
        pad_token="<pad>" if "<pad>" in specials else names[0],
    )


def build_byte_level(
    chat_template: str | None, specials: tuple[str, ...], split: str = "gpt-2", ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    """As Llama 3, Qwen and SmolLM have it; `split` is llama.cpp's name of how text is taken apart first."""
    model = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    elif split in GGUF_PRE_TOKENIZER_SPLITS:
        pattern = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[split]), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([pattern, rest])
    else:
        model.pre_tokenizer = whole
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator([TEXT, "1234 12345 2026", "    x  y", "it's I'll WE'RE"] * 3, trainers.BpeTrainer(
        vocab_size=400, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        chat_template=chat_template,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[-1],
    )
