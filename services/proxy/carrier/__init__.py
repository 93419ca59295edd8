"""Carrying the usual tokens of streams outside of the interpreter (decision 20)."""
