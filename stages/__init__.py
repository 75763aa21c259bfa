"""The stages of EdgeTrain: pure functions over records, usable without the command line."""
