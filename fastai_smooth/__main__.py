"`python -m fastai_smooth` is the command `fastai_smooth`, but that its `bench` works where there is torch alone"
import sys

if sys.argv[1:2] == ['bench']: from .bench import bench as main
else: from .compare import main

sys.exit(main())
