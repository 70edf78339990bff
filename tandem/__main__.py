"""`python -m tandem VERB ...`, where the command is not on the path."""

import sys

from tandem.cli import main

sys.exit(main())
