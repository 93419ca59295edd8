"""Stream failover: a stream whose replica is lost goes on, token for token, from another one.

`rules` says which requests can, and how; `tape` keeps what was delivered of one stream and turns
what comes next into the same stream; `plan` makes the request that asks another replica to go on;
`seam` rewrites that replica's chunks. All of it is pure: bytes and values in, bytes and values out.
"""
