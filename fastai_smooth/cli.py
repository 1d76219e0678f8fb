"""The program `fastai_smooth`: the parameters of a command are its options, their docments what `--help` says, and bad input is one line.
The standard library alone is imported here, so that Ctrl-C is taken care of while fastai loads, which takes seconds."""
import argparse, inspect, math, os, signal, sys, tempfile, warnings
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Literal, get_args, get_origin

__all__ = ['BadInput', 'or_bad_input', 'number', 'count', 'whole', 'share', 'positive', 'parser', 'run_command',
           'stop_if_interrupted', 'new_folder', 'new_file', 'complete']

COMMANDS = 'compare', 'bench' # each a function in the module of its name; the first where none is named

class BadInput(ValueError):
    "What a user gave can't be worked with: the program prints the message as one line, and ends with exit code 2."

@contextmanager
def or_bad_input(
    msg:str, # Which input, and what to do about it
):
    "Whatever a broken file, a download or a model raises inside becomes a `BadInput`."
    try: yield
    except Exception as e: raise BadInput(f'{msg} ({type(e).__name__}: {str(e)[:300]})') from e

def _say(message): print(f'fastai_smooth: {" ".join(message.split())}', file=sys.stderr, flush=True)


# --- options

class number:
    "A type of options: makes a number of text, or what else `kind` does. In signatures it is shown as int, float or str."
    def __init__(self,
        what:str, # Such as 'a number above 0'
        kind, # `int` or `float`, or another function of text
        ok, # A function of the number: is it one of these?
    ): self.what,self.kind,self.ok = what,kind,ok

    def __repr__(self): return self.kind.__name__ if self.kind in (int,float) else 'str'
    def __call__(self, s):
        try: x = self.kind(s)
        except ValueError: x = None
        if x is None or not self.ok(x): raise argparse.ArgumentTypeError(f'{s} is not {self.what}')
        return x

count = number('a whole number of 1 or more', int, lambda x: x >= 1)
whole = number('a whole number of 0 or more', int, lambda x: x >= 0)
share = number('a number in [0, 1)', float, lambda x: 0 <= x < 1)
positive = number('a number above 0', float, lambda x: 0 < x < math.inf)

class _Parser(argparse.ArgumentParser):
    def error(self, message): raise BadInput(f'{message} (--help lists what there is)') # argparse's own prints the usage, too

def _argument(type_, default):
    "What argparse is told of a parameter: a `bool` is a flag, a list takes several values, and any other type is a function of text"
    if type_ is bool: return dict(action='store_true')
    if get_origin(type_) is list: return {**_argument(*get_args(type_), default), 'nargs': '+'}
    return dict(choices=get_args(type_), default=default) if get_origin(type_) is Literal else dict(type=type_, default=default)

def _help(docment, default):
    several = default if isinstance(default, tuple) else [default]
    shown = ' '.join(f'{o:g}' if isinstance(o, float) else str(o) for o in several)
    return ' '.join(docment.split()) + ('' if default is None or default is False else f' (default: {shown})')

def parser(
    command, # A function, all of whose parameters have docments and defaults
) -> argparse.ArgumentParser:
    "Its options are the parameters. The first paragraph of the docstring stands above them in `--help`, the others below."
    from fastcore.docments import docments # takes a while, too
    name,(description,_,epilog) = command.__name__,inspect.getdoc(command).partition('\n\n')
    p = _Parser(usage=f'fastai_smooth {"[compare]" if name == "compare" else name} [options]', description=description, epilog=epilog,
                allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,o in docments(command, full=True, returns=False).items():
        p.add_argument(f'--{k.replace("_", "-")}', help=_help(o.docment, o.default), **_argument(o.anno, o.default))
    return p


# --- files

@contextmanager
def new_folder(
    out, # A `Path`
):
    "Makes a folder, and sees that files can be written there. In the end it is removed where it is new and empty, as are folders above it."
    new = [o for o in (out, *out.parents) if not os.path.exists(o)]
    try:
        with or_bad_input(f"--out {out}: can't write there"):
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out) as f: f.write(bytes(2**18)) # about what a picture takes
        yield
    finally:
        with suppress(OSError, ValueError): # of what is not empty, or gone, or has no good name
            for o in new: o.rmdir()

def new_file(
    names, # Of `Path`s
):
    "The first one that is free, made as an empty file: two programs at the same time take two."
    for file in names:
        with suppress(FileExistsError):
            file.touch(exist_ok=False)
            return file

@contextmanager
def complete(
    file, # A `Path`
):
    "Where to write what becomes `file` when all of it is written; its folder may have been removed."
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + '.part')
    try:
        yield part
        part.replace(file)
    finally: part.unlink(missing_ok=True)


# --- the program

def _command(argv):
    "The function that the first argument names, and the other arguments"
    name,argv = (argv[0],argv[1:]) if argv and argv[0] in COMMANDS else (COMMANDS[0],argv)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning) # fastai's own use of torch.jit.script
        return getattr(import_module(f'fastai_smooth.{name}'), name),argv

def run_command(
    argv:list, # Command line, without the name of the program
) -> int: # Exit code
    "Run the command that the first argument names, or `compare`."
    try:
        command,argv = _command(argv)
        command(**vars(parser(command).parse_args(argv)))
        return 0
    except BadInput as e: code,message = 2,str(e)
    except KeyboardInterrupt as e:
        print(file=sys.stderr) # below the ^C
        code,message = 130,', '.join(['interrupted', *e.args])
    _say(message)
    return code

def _stop(*_):
    "Ends the process at once, whatever is being imported: there is nothing to keep."
    os.write(2, b'\nfastai_smooth: interrupted\n')
    os._exit(130)

_interrupted = False # by Ctrl-C, at any time in this process

def _interrupt(*_):
    "Raises KeyboardInterrupt, and remembers it for where that is lost."
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt

def stop_if_interrupted(
    *args, # Not looked at: this may be an event of a `Callback`
):
    """Raises KeyboardInterrupt if there was a Ctrl-C. What takes long calls this again and again, as that of the signal may not arrive:
    fastai has some `except:`, Python ignores what `__del__` raises, and the ValueError of int('x') may take its place."""
    if _interrupted: raise KeyboardInterrupt

def _on_ctrl_c(handler):
    "Sets what Ctrl-C does, unless it is ignored, as it is for jobs in the background."
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN: signal.signal(signal.SIGINT, handler)

def _stdout_error():
    "The error that printing gives, such as that nobody reads, or that a disk is full; then nothing more is printed"
    try: print(flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # Python prints what is left when it ends
        return e

def main():
    "Runs the command of this process, and returns its exit code."
    _on_ctrl_c(_stop)
    for o in (sys.stdout, sys.stderr):
        if hasattr(o, 'reconfigure'): o.reconfigure(errors='backslashreplace') # a terminal need not know every character
    _command(sys.argv[1:]) # the imports
    try:
        _on_ctrl_c(_interrupt)
        code = run_command(sys.argv[1:])
        if sys.stdout: sys.stdout.flush() # here, where an error can be told
    except KeyboardInterrupt: # while the last words are printed
        _say('interrupted')
        code = 130
    except OSError as e:
        of_stdout = _stdout_error()
        if isinstance(of_stdout, BrokenPipeError): return 141 # as of any program whose output goes to `head`
        _say(f"can't write to standard output ({of_stdout.strerror})" if of_stdout else str(e))
        code = 2
    _on_ctrl_c(_stop) # what Python does at its end has nothing to keep, either
    return code
