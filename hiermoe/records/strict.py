"""What every part of a configuration is."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Values that were checked once and never change; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
