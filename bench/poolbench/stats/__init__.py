"""Statistics of paired samples."""
