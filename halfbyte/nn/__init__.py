"""Modules and autograd over ops."""

from halfbyte.nn.attention import attention
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import lora_product
from halfbyte.nn.loss import count_supervised, supervised_loss

__all__ = ["Linear4bit", "count_supervised", "lora_product", "supervised_loss"]
