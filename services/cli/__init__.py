"""The command `redmesh`: starts a whole mesh on one machine, and steers one that runs anywhere."""
