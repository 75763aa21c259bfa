"""The command line of EdgeTrain."""

__version__ = "0.1.0"
