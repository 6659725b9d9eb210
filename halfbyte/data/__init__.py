"""From a file to batches: rows -> (template, mask) -> examples -> optimizer steps of padded micro-batches."""

from halfbyte.data.batches import Batch, collate, epoch_order, padded_share, plan_steps, training_steps
from halfbyte.data.cache import (
    content_sha256,
    default_cache_dir,
    encode_or_recall,
    rows_sha256,
    tokenizer_sha256,
)
from halfbyte.data.encoding import EncodingStatistics, encode_rows
from halfbyte.data.examples import IGNORE_INDEX, Example, LazyExamples, fingerprint, lengths_of, preview
from halfbyte.data.packing import PackedExamples, best_fit, pack
from halfbyte.data.reading import read_rows, read_sources
from halfbyte.data.rows import Alpaca, Piece, Row, Source
from halfbyte.data.templates import Tokenizer, render_alpaca_prompt, render_chat

__all__ = [
    "IGNORE_INDEX",
    "Alpaca",
    "Batch",
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
    "encode_rows",
    "epoch_order",
    "fingerprint",
    "lengths_of",
    "pack",
    "padded_share",
    "plan_steps",
    "preview",
    "read_rows",
    "read_sources",
    "render_alpaca_prompt",
    "render_chat",
    "rows_sha256",
    "tokenizer_sha256",
    "training_steps",
]
