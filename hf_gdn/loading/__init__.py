"""Models from a folder, the hub or a bare config, texts, and the two embedded models, for evaluation and chat."""
