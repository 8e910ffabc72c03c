"""Global average pooling: the mean of each feature map, (N, H, W, C) -> (N, C)."""

from poolbench.ops.global_avg_pool import candidates, natives, op

__all__ = ["candidates", "natives", "op"]
