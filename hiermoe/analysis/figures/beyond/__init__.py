"""Figures beyond the paper: what its ideas do elsewhere."""
