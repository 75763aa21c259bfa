"""How much each layer and channel matters for one task."""
