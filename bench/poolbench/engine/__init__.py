"""Starts worker processes and runs races in them."""
