"""The HTTP surface: which routes there are, and who answers them."""
