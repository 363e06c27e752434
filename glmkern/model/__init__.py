"""ChatGLM2: configuration, packed batches, the prefix, a layer, the model; a file each.

Empty on purpose: reading a configuration costs no import of torch.
"""
