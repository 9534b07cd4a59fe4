"""The three methods: all samples at once by rules or per-sample copies, and a loop."""
