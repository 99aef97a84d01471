"""HumanEval by HTTP: programs that a small model writes, and what compression makes of them."""
