"""Statistics of measured ratios: pure functions over recorded samples."""
