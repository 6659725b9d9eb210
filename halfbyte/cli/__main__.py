"""`python -m halfbyte.cli` is `halfbyte`, for where the script is not on the path."""

import sys

from halfbyte.cli import main

if __name__ == "__main__":
    sys.exit(main())
