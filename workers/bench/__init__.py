"""Measures the engine in this process: the workloads, one run of them, and the machine's own limits."""
