"""What a batch decides, without I/O."""
