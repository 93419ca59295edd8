"""Where a request should go, as far as a proxy can tell; the ledger decides in the end.

Nothing here reads a clock or draws a random number: two proxies with the same table and the same
history say the same.
"""
