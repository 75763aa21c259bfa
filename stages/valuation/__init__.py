"""Which samples of a stream are worth training on."""
