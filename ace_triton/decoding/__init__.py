"""The compiled decoding step: which models it takes, proof that it computes what they do, and decoding with it."""
