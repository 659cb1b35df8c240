"""Imported by the fork server that ranks come from, so that no rank pays for importing torch and megatron.

Safe to fork after: none of these imports starts a thread of its own or touches a device.
"""

import os

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whoever asks for GPUs must not initialise one before ranks fork

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

import hiermoe.megatron.attach  # noqa: E402
import hiermoe.megatron.recorder  # noqa: E402
import hiermoe.narrow.record  # noqa: E402
import hiermoe.narrow.trainer  # noqa: E402, F401
