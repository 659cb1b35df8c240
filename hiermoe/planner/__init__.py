"""What it would cost: dispatch schemes, their exact traffic, the cost model, and HierD-ES. Pure functions of tensors."""
