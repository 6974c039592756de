"""The commands of ``ace-triton``, one a file; :mod:`ace_triton.commands.cli` puts them together."""
