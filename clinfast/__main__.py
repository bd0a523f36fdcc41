import sys

from clinfast_command import main

sys.exit(main())
