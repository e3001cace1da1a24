"""From texts to tensors: tokens, alignment of two versions, position types, and batches by token count.

`Inputs` is what every stage runs on, whether it reads one version of a text or two.
"""
