"""What a compiled training step needs: memory, FLOPs, traffic, exchange; and how long it takes by those."""
