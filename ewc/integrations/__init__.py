"""For training with other libraries, where a few lines would not do.

Nothing here is imported by `ewc` itself; each module belongs to one library, and says which.
"""
