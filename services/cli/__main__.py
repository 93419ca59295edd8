"""Run the command line as `python -m services.cli`; the supervisor starts services this way."""

import sys

from services.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
