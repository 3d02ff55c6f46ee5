"""`python -m streamgen`, also under torchrun."""

import sys

from streamgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
