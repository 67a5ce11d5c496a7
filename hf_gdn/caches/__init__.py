"""What caches of hybrid models lack in transformers."""
