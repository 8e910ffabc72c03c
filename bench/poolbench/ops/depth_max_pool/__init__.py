"""Depthwise max pooling: the maximum over each k neighbouring channels."""

from poolbench.ops.depth_max_pool import candidates, op

__all__ = ["candidates", "op"]
