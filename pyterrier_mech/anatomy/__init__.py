"""A Hugging Face module as a map of sites.

`families` is the one table that knows module names; `layers` finds a layer's parts by it and computes with them;
`attention` has the only soft-max. `ModelMap` says where each site is, and its `run` is the only place that hooks a
module: it records some sites, edits others, and reads the last hidden states. `readouts` says which of them are read,
and `resizing` makes the linear maps smaller.
"""
