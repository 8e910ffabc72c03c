"""`python -m poolbench`: the command `poolbench`."""

from poolbench.cli import main

if __name__ == "__main__":
    main(prog_name="poolbench")
