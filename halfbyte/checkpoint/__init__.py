"""What is written to disk, and read back.  Tensors are safetensors, the rest is JSON; nothing is pickled."""
