"""Examples, rows, arguments and the loop that tunes a prefix."""
