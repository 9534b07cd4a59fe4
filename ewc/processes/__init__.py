"""Distributed training: what processes exchange, and how sharded parameters are laid out."""
