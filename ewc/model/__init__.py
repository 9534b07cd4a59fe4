"""A model: the names of its parameters, and what must be as before after running it."""
