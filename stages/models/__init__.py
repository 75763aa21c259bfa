"""Architectures, the deploy form, the user's state dict, input adapters and heads."""
