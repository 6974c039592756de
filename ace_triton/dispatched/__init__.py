"""Prunes models that accelerate has spread over devices, memory and disk (``device_map``)."""
