"""hf-gdn, the command; ``accelerate launch -m hf_gdn.eval`` is the same. One file a command: `app` finds them.

Exit codes: 0 passed; 1 not the same model, or slower than before; 2 something given cannot be used, a package of
``hf-gdn[eval]`` is missing, or the installed transformers does not fit the model's family; 130 interrupted.
"""

from __future__ import annotations

import sys

# What comes with hf-gdn[eval], by the names they are imported by; what these packages need themselves included.
EXTRA = {
    "click",
    "datasets",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "numpy",
    "psutil",
    "pyarrow",
    "rich",
    "shellingham",
    "typer",
}


def main() -> None:
    """Entry point. A missing package of the extra is one sentence, whichever command needs it and wherever."""
    if sys.argv[1:2] == ["run"] and sys.argv[2:3] != ["--help"]:  # nothing around the program, and no extra
        from .program import main as run

        return run(sys.argv[2:])
    try:
        from .app import main

        main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        print(
            f"hf-gdn: this command needs the package {package}, which is not installed: pip install 'hf-gdn[eval]'",
            file=sys.stderr,
        )
        sys.exit(2)
