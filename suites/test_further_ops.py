"""The ops that a bare run leaves out: `poolbench run --op NAME`, or all of them by `poolbench run further_ops`."""
