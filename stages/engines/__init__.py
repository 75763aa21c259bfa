"""What executes graphs and trains plans: one protocol, several engines."""
