"""The commands of ``ace-triton``, one a file; :mod:`ace_triton.cli` puts them together."""
