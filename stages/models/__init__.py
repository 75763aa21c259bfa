"""Architectures, tracing, the deploy form, input adapters and heads."""
