"""Patience with a server that runs in a thread."""

import time

PATIENCE = 60
"""The longest wait for the server, in seconds."""

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


def until(condition):
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
