"""Where things are: the hierarchy of the interconnect, the placement of experts, and what links cost."""
