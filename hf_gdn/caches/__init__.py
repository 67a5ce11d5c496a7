"""What caches of hybrid models lack in transformers, and what there is in a static one."""
