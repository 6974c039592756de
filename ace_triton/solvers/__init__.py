"""What moves the kept weights after the mask is chosen."""
