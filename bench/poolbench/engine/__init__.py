"""Start worker processes and run races in them."""
