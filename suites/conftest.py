"""Shared by the suites: nothing yet. A @candidate defined here joins its op's races."""
