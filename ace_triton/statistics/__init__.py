"""What a layer's inputs and outputs looked like over the calibration data."""
