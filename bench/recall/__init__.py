"""What recall wins and what it costs, on the embedded model; see docs/recall.md."""
