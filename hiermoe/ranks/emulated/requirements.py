"""What a machine must allow before it can emulate a cluster."""

import re
import sys
from pathlib import Path

CONTAINER_ADVICE = "a container needs --cap-add NET_ADMIN --cap-add SYS_ADMIN --security-opt seccomp=unconfined"

# Numbers of capabilities, linux/capability.h.
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


def missing_requirement() -> str | None:
    """What this process lacks and how to get it, in one line; None where it lacks nothing."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}; choose ranks=local"
    held = effective_capabilities()
    missing = [name for name, number in _CAPABILITIES.items() if not held >> number & 1]
    if not missing:
        return None
    return (
        f"this process lacks {' and '.join(missing)}, which network namespaces need: run it as root (sudo); "
        + CONTAINER_ADVICE
    )


def effective_capabilities() -> int:
    """Bit mask of what this process may do."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1], 16)
