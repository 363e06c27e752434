"""What needs a GPU: test_model.py for pytest, and the programs that `make gpu` runs."""
