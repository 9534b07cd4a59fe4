"""Collection from a model whose parameters are sharded."""
