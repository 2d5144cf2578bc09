"""A trained network as a plan of fused steps, and what runs it."""
