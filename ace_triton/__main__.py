"""``python -m ace_triton`` is ``ace-triton``."""

from .commands.cli import main

main()
