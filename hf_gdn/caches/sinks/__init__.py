"""Attention sinks: `SinkCache` reads any number of tokens in fixed memory."""

from .cache import SUPPORTED, SinkCache, SinkLayer

__all__ = ["SUPPORTED", "SinkCache", "SinkLayer"]
