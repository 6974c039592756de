"""``python -m ace_triton`` is ``ace-triton``."""

from .cli import main

main()
