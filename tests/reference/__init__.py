"""Slow float64 twins of renorm's numbers, in loops that can be checked by eye. The package never imports them."""
