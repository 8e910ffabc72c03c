"""Depthwise max pooling: the maximum over each k neighbouring channels."""

from poolbench.ops.depth_max_pool import candidates, natives, op

__all__ = ["candidates", "natives", "op"]
