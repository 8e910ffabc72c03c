"""Shared by the suites: nothing. A @candidate defined here joins the races of its op."""
