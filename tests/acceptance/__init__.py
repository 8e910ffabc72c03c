"""Maintainers' checks of the timings: the acceptance test and the comparison with other tools."""
