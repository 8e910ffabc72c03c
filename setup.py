"""The packages: bench/poolbench, and the suites beside it as poolbench.suites; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("bench"), "poolbench.suites"],
    package_dir={"": "bench", "poolbench.suites": "suites"},
)
