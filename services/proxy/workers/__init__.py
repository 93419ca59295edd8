"""Several processes for one proxy: a parent that only supervises, and workers that serve.

Each worker listens on the public port with a socket of its own (SO_REUSEPORT: the kernel deals new
connections out), and is a proxy in every respect: an event loop, connections to Redis, a name in
the ledger, a member of the fleet with an admin port. So the loss of one loses what it carried, and
nothing else. The parent is on nobody's path: it holds the port, starts workers and replaces those
that end, passes signals on, and shows what they sum up to.
"""
