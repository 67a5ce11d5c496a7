"""hf-gdn chat: `conversation` is what was said and the cache that holds it, `terminal` reads and prints."""
