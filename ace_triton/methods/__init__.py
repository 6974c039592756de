"""The pruning methods: each turns a weight and its statistics into a score, or prunes by itself."""
