"""The demonstration: a small GLM-MoE-DSA language model, how it was trained, and what `indexcache demo` runs."""
