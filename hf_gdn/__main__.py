"""python -m hf_gdn: the hf-gdn command."""

from .cli import main

main()
