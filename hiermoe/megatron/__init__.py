"""The seam to Megatron-Core: model configurations, CPU stand-ins, the router recorder and the recording run.

The `*_config` modules and `checkpoint_folder` are pure and cheap to import; most others import torch and megatron.
"""
