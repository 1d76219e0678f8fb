"`python -m fastai_smooth` is the command `fastai_smooth`"
import sys

from .compare import main

sys.exit(main())
