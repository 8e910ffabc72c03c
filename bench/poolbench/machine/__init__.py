"""What the machine is and what else uses it."""
