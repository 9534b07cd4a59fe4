"""From the Fisher information to the penalty: one quadratic for any number of tasks."""
