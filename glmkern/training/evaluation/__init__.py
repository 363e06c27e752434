"""Loss, answers and scores on the rows of a file."""
