"""``accelerate launch -m hf_gdn.eval ppl ...``: the command hf-gdn, in several processes."""

from ..cli import main

main()
