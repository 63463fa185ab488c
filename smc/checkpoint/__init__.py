"""A pricer's state as a safetensors file, and the ring that copies it while training goes on."""
