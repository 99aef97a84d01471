"""Chat traffic against a running cluster, and what its users would see."""
