"""Several adapters trained at once over one backbone: one forward and backward pass over the rows of all of them.

Each adapter is made, clipped, stepped, measured and published as a run of its own would be; only the passes are shared.
"""
