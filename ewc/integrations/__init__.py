"""Training with other libraries, where a few lines would not do: one module for each library."""
