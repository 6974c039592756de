"""Statistics of the inputs and outputs of layers, collected on calibration text."""
