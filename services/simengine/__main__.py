"""`python -m services.simengine`: what the agent starts."""

import sys

from services.simengine.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
