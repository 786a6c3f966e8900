"""The decode round: its steps, its records, and where a request's text ends.

Imports torch and the standard library only. Imports nothing of SGLang and no other package of ours.
"""
