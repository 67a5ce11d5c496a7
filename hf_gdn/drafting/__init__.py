"""Which tokens to draft in speculative decoding, and how many."""
