"""The three methods: `"rule"` and `"vmap"`, all samples at once; `"loop"`, one at a time."""
