"""Read checkpoints and text, and write checkpoints."""
