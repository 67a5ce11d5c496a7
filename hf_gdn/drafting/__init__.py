"""Speculative decoding: choose which tokens to draft, and how many."""
