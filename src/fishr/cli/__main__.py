import sys

from fishr.cli import main

sys.exit(main())
