"""Where tensors begin in a safetensors file: at multiples of 64 bytes, as kernels that read them in place like best.

safetensors sorts by type and name and leaves no gaps, so that after the first odd size nothing begins at a line of the
cache. The format wants no gaps either, but any order: what is a multiple of 64 bytes long, which is all that is large,
comes first, and the header is filled up with blanks, as the format allows.
"""

import json
from pathlib import Path

ALIGNMENT = 64  # bytes: a line of the cache and the widest vector


def align_tensors(file: Path) -> None:
    """Rewrite a safetensors file, its tensors in an order in which the large ones begin at multiples of 64 bytes."""
    aside = file.with_name(file.name + ".aligned")
    with file.open("rb") as source, aside.open("wb") as target:
        size = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(size))
        metadata = header.pop("__metadata__", {})
        spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        # What is not a multiple keeps its order, which is by type, the widest first.
        names = sorted(spans, key=lambda name: ((spans[name][1] - spans[name][0]) % ALIGNMENT != 0, spans[name]))
        end = 0
        for name in names:
            begin, end = end, end + spans[name][1] - spans[name][0]
            header[name]["data_offsets"] = [begin, end]
        text = json.dumps({"__metadata__": metadata} | {name: header[name] for name in names}).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        target.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            begin, end = spans[name]
            source.seek(8 + size + begin)
            target.write(source.read(end - begin))
    aside.replace(file)
