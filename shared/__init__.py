"""What two programs of redmesh must agree on: words, data, keys and the one door to Redis."""
