"""Several processes: what they exchange, and how sharded parameters are laid out."""
