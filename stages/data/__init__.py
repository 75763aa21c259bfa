"""Data sources and blocks of samples."""
