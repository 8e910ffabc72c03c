"""The machine: its properties and its background load."""
