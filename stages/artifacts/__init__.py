"""Records, their HDF5 form, streams and files."""
