"""Which layers and channels train under a budget."""
