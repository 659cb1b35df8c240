"""What stock Megatron-Core lacks on a machine without GPUs or without Transformer Engine."""
