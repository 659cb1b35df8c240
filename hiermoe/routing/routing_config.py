"""The configuration of a routing: its schema."""

from typing import Any

from hiermoe.records.strict import Strict


class RoutingConfig(Strict):
    """Where routing comes from: one file in conf/routing/."""

    name: str
    source: dict[str, Any]
