"""What only a card can tell, in one command without Ray: right tokens, speed, memory, ways to the host."""
