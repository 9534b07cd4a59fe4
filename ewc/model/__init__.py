"""The model's side: names of its parameters, live bindings to them, and what a run must restore."""
