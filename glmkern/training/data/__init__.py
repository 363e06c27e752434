"""From a data file to rows of tokens, their order and the packs of a step."""
