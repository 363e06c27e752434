"""How much memory and time a run takes, told before anything is loaded; see docs/plan.md.

Empty on purpose: naming the GPUs costs no import of torch.
"""
