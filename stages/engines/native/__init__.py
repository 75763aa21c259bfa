"""The native engine: graph and plan lowered into a program image that a small C library runs."""
