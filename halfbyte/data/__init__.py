"""From a file to batches: rows -> (template, mask) -> examples -> optimizer steps of padded micro-batches."""

from halfbyte.data.batches import Batch, collate, epoch_order, padded_share, plan_steps, training_steps
from halfbyte.data.cache import (
    content_sha256,
    default_cache_dir,
    encode_or_recall,
    rows_sha256,
    tokenizer_sha256,
)
from halfbyte.data.encoding import Encoder, EncodingStatistics, encode_prompt, encode_rows
from halfbyte.data.examples import IGNORE_INDEX, Example, LazyExamples, fingerprint, lengths_of, preview
from halfbyte.data.packing import PackedExamples, best_fit, pack
from halfbyte.data.reading import read_rows, read_sources
from halfbyte.data.rows import Alpaca, Piece, Row, Source
from halfbyte.data.sources import is_local, source_files
from halfbyte.data.templates import NAMED_TEMPLATES, Tokenizer, render_chat, set_chat_template

__all__ = [
    "IGNORE_INDEX",
    "NAMED_TEMPLATES",
    "Alpaca",
    "Batch",
    "Encoder",
    "EncodingStatistics",
    "Example",
    "LazyExamples",
    "PackedExamples",
    "Piece",
    "Row",
    "Source",
    "Tokenizer",
    "best_fit",
    "collate",
    "content_sha256",
    "default_cache_dir",
    "encode_or_recall",
    "encode_prompt",
    "encode_rows",
    "epoch_order",
    "fingerprint",
    "is_local",
    "lengths_of",
    "pack",
    "padded_share",
    "plan_steps",
    "preview",
    "read_rows",
    "read_sources",
    "render_chat",
    "rows_sha256",
    "set_chat_template",
    "source_files",
    "tokenizer_sha256",
    "training_steps",
]
