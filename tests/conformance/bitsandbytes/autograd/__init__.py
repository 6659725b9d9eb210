"""Products with a gradient."""
