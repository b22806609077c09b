"""`python -m pipeline.convert`, the same as `ibeton convert`."""

import sys

from ibeton.pipeline.convert.converter import main

if __name__ == "__main__":
    sys.exit(main())
