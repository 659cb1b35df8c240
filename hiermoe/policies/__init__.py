"""Where experts go: the protocol of a placement policy, HierD-ES, search, the price of moving, and systems."""
