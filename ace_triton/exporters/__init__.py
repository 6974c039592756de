"""Export to other engines: one file an engine, and the registry through which models are exported and checked."""
