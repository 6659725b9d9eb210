"""The pages of the layer that comes next, asked for while one is being computed: forward, and backward in reverse.

Where all of a model's pages are in memory there is nothing to ask for, and to ask costs: the system looks at every
page. So nothing is asked until the process has waited for a page of some file (a major fault, which the system counts),
and then for two passes through the layers.

To ask takes time too, 20 ms for 64 MB, so one thread makes all requests, beside the products.
"""

import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from halfbyte.huggingface.mapped import MappedFile, Span, spans_of

_PASSES = 2  # forward and backward


def prefetch_layers(model: Any, files: Sequence[MappedFile]) -> "Prefetcher | None":
    """Let a transformers model's layers ask for each other's pages; None if it has no list of layers.

    The layers are the list of modules that holds the most of what is mapped; the output layer follows the last.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=lambda layers: sum(span.nbytes for span in spans_of(layers, files)), default=None)
    if layers is None:
        return None
    head = model.get_output_embeddings()
    places = [spans_of(layer, files) for layer in layers] + [spans_of(head, files) if head is not None else []]
    prefetcher = Prefetcher(files, places)
    _hook(model.get_input_embeddings().register_forward_pre_hook, lambda *_: prefetcher.check_files())
    for place, layer in enumerate(layers):
        _follow(layer, place, prefetcher)
    return prefetcher


class Prefetcher:
    """Follows a model through its layers."""

    def __init__(self, files: Sequence[MappedFile], places: list[list[Span]]) -> None:
        """`places`: what each layer reads, in the order of the forward; the last is the output layer."""
        self._files = files
        self._places = places
        self._place = self._wanted = -1
        self._faults = _major_faults()
        self._left = 0  # layers for which requests are still made
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="halfbyte-prefetch")

    def reached(self, place: int) -> None:
        """A layer's forward, or its backward, begins.

        Raises:
            HalfbyteError: a file was written to; looked at once a pass.
        """
        if place == 0:
            self.check_files()
        # Where the forward ends, the backward begins.
        step = 1 if place == 0 or place > self._place else -1
        self._place = place
        faults = _major_faults()
        if faults != self._faults:
            self._faults, self._left = faults, _PASSES * len(self._places)
        following = place + step
        if self._left and 0 <= following < len(self._places):
            self._left -= 1
            self._wanted = following
            self._thread.submit(self._request, following)

    def check_files(self) -> None:
        """Raises HalfbyteError if a file was written to."""
        for file in self._files:
            file.check_unchanged()

    def _request(self, place: int) -> None:
        for span in self._places[place]:
            for part in span.parts():
                if self._wanted != place:  # the model is further than the disk
                    return
                part.file.request(part.offset, part.nbytes)


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _follow(layer: nn.Module, place: int, prefetcher: Prefetcher) -> None:
    def ends(_layer: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            # Its gradient is there: the layer's backward begins.
            hidden.register_hook(lambda _gradient: prefetcher.reached(place))  # type: ignore[no-untyped-call]

    _hook(layer.register_forward_pre_hook, lambda *_: prefetcher.reached(place))
    _hook(layer.register_forward_hook, ends)


def _hook(register: Callable[[Any], Any], hook: Any) -> None:
    hook.halfbyte_name = "prefetch"  # by which decode.py knows that it changes nothing
    register(hook)
