"""The harness held against itself on the user's machine: selftest, acceptance bars, peers."""
