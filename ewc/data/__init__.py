"""Batches: read from a loader, cut into samples, and passed to the model."""
