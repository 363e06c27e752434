"""`python -m glmkern`, which takes the place of main.py in the published train.sh."""

import sys

from glmkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
