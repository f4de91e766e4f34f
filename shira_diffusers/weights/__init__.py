"""A model's weights: which are adapted (targets), where they lie in memory (finder), and the kernels that write them.

In: modules, parameter names, indices and values. Out: tensors found, bits read, bits written in place. Knows nothing of
adapters, files or diffusers: it overwrites entries, whatever they mean.
"""
