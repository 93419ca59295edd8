"""The data that two programs must agree on, as frozen msgspec structs. No I/O, no clock."""
