"""The command `fastai_smooth`, also as `python -m fastai_smooth`; its `bench` works where there is torch alone. Nothing is imported
before Ctrl-C is taken care of: fastai takes seconds."""
import os, signal, sys

def _say(message): print(f'fastai_smooth: {" ".join(message.split())}', file=sys.stderr, flush=True)

def _stop(*_):
    "Ends the process at once, whatever is being imported: there is nothing to keep."
    os.write(2, b'\nfastai_smooth: interrupted\n')
    os._exit(130)

def _on_ctrl_c(handler):
    "Sets what Ctrl-C does, unless it is ignored, as it is for jobs in the background."
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN: signal.signal(signal.SIGINT, handler)

def _command():
    "The function that runs the command; it takes seconds to import."
    if sys.argv[1:2] == ['bench']: from .bench import bench as run
    else: from .compare import main as run
    return run

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
    run = _command()
    try:
        _on_ctrl_c(signal.default_int_handler)
        code = run()
        if sys.stdout: sys.stdout.flush() # here, where an error can be told
    except KeyboardInterrupt:
        _say('interrupted')
        code = 130
    except OSError as e:
        of_stdout = _stdout_error()
        if isinstance(of_stdout, BrokenPipeError): return 141 # as of any program whose output goes to `head`
        _say(f"can't write to standard output ({of_stdout.strerror})" if of_stdout else str(e))
        code = 2
    _on_ctrl_c(_stop) # what Python does at its end has nothing to keep, either
    return code

if __name__ == '__main__': sys.exit(main())
