"""stagemesh: large language models served over many GPUs and machines, on Ray Serve."""

__version__ = "0.1.0"
