"""Pictures for many clients from one resident pipeline, whose adapters change from one denoising step to the next.

In: requests with a mix of adapters each. Out: their pictures, step by step, each with the bits that it has alone.
"""
