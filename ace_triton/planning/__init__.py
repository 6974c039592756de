"""Say before a run what it would prune, and what memory, disk and time it would take."""
