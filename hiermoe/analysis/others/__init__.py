"""Measurements that others published, against what this suite predicts of them."""
