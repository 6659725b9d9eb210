"""Whether a model takes packed rows: texts that share one, told apart by position ids that begin anew.

transformers makes the block-diagonal mask of it for every model that builds its masks in the library's common place.
Others do without: those with a recurrent state or a convolution carry it from text to text, those that count
positions by themselves count on, and none of them says so. So it is tried, on the model as it is loaded.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.huggingface.stand_ins import stand_ins
from halfbyte.nn import Linear4bit

_FIRST, _SECOND = 9, 12  # tokens of two texts
_OF_A_LEAK = 0.25  # rounding makes a hundredth of what a leak does, and half a leak is half of it


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether a text behind another one in a row is computed as it is alone.

    What the second text's logits differ by from those of the text alone is held against what they differ by when both
    are one text; three forward passes of a few tokens, in evaluation mode. Layers in 4 bits only shuffle what they
    read, so that no weight of a model larger than memory has to come from the disk for this.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, _FIRST + _SECOND), generator=torch.Generator().manual_seed(0))
    together = torch.arange(_FIRST + _SECOND)[None]
    restarting = torch.cat([together[:, :_FIRST], together[:, :_SECOND]], dim=1)

    def logits(ids: Tensor, position_ids: Tensor) -> Tensor:
        out = model(input_ids=ids.to(model.device), position_ids=position_ids.to(model.device), use_cache=False)
        second: Tensor = out.logits[0, -_SECOND:].float()
        return second

    training = model.training
    model.eval()
    try:
        with stand_ins(model, Linear4bit, _shuffle):
            alone = logits(ids[:, _FIRST:], together[:, :_SECOND])
            packed = logits(ids, restarting) - alone
            leaking = logits(ids, together) - alone
    except (TypeError, ValueError):  # a model that has no use for position ids
        return False
    finally:
        model.train(training)
    return bool(packed.norm() <= _OF_A_LEAK * leaking.norm())


def _shuffle(layer: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(layer.out_features)
    places = torch.randint(layer.in_features, (layer.out_features,), generator=generator)
    return x[..., places.to(x.device)]
