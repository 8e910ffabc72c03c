"""The checks of the support matrix."""
