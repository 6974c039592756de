"""Many prunings of one model under the same conditions, compared on one page (``ace-triton study``).

:mod:`.cells` and :mod:`.recipes_grid` list what to run, :mod:`.run` runs it into a :mod:`.journal`, and :mod:`.page`
draws the journal.
"""
