"""Programs that train without Python: a run as C sources, and what they leave as a run again."""
