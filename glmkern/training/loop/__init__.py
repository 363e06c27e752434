"""The training loop: steps, optimiser, checkpoints of its state, processes."""
