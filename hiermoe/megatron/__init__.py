"""The seam to Megatron-Core: model configurations, CPU stand-ins, the router recorder and the recording run.

`model_config` and `record_config` are pure and cheap to import; every other module here imports torch and megatron.
"""
