"""What it would cost: dispatch schemes, their exact traffic, cost model and HierD-ES. Pure functions of tensors."""
