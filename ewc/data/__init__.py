"""A batch, taken apart into samples, and what a model makes of it: from batch to outputs."""
