"""What a forward and a backward pass cost, in MACs and bytes."""
