"The program `fastai_smooth`, as `python -m fastai_smooth`."
from .cli import main

if __name__ == '__main__': raise SystemExit(main())
