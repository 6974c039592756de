"""Many prunings of one model, measured alike and shown on one page (``ace-triton study``).

:mod:`.cells` says what is run, :mod:`.run` runs it into a :mod:`.journal`, and :mod:`.page` draws what the
journal holds.
"""
