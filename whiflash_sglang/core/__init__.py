"""A decode round on plain tensors and numbers: its steps, its records, and where a request's text ends.

Imports torch and the standard library. Imports no other package of ours and nothing of SGLang.
"""
