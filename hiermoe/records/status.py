"""How a run ended."""

from typing import Literal

Status = Literal["ok", "failed", "not_applicable"]


class NotApplicable(ValueError):
    """The combination asked for has no meaning or no data (HD4 on three levels, a trace that nobody recorded).

    A sweep records it with its reason and goes on; a single run ends with the message.
    """
