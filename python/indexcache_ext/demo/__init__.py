"""The demonstration: a small GLM-MoE-DSA language model, the script that trained it, and what `indexcache demo` runs."""
