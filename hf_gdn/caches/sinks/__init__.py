"""Attention sinks: `SinkCache` processes any number of tokens in constant memory."""

from .cache import SUPPORTED, SinkCache, SinkLayer

__all__ = ["SUPPORTED", "SinkCache", "SinkLayer"]
