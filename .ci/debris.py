#!/usr/bin/env python3
"""Is something in the saved outputs that is of no use to a reader? `python .ci/debris.py [notebook ...]`, by default all of `nbs/`.

Paths of the machine that ran the notebook, warnings, what is left of progress bars, tracebacks, and addresses of objects."""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
debris = {
    'a local path': re.compile(r'(?<![\w.:/-])(?:/(?:work|root|home|tmp|Users|mnt|private|var/folders)/[\w.-]|[A-Z]:\\+Users\\)'),
    'a warning': re.compile(r'\b\w*Warning:'),
    'a progress bar': re.compile(r'[█▏▎▍▌▋▊▉]|\r(?!\n)|\b(?:it/s|s/it)\]|<progress\b|progress-bar-interrupted|FloatProgress\('),
    'a traceback': re.compile(r'Traceback \(most recent call last\)'),
    'an address of an object': re.compile(r'\b(?:at )?0x[0-9a-fA-F]{8,}\b'),
    'a colour of a terminal': re.compile('\x1b\\['),
}

def text(s): return s if isinstance(s, str) else ''.join(s)

def texts(out):
    "What a reader can read of an output"
    if out['output_type'] == 'stream': yield text(out['text'])
    elif out['output_type'] == 'error': yield 'Traceback (most recent call last)\n' + '\n'.join(out['traceback'])
    for mime,data in out.get('data', {}).items():
        if not mime.startswith('image/') or mime == 'image/svg+xml': yield text(data) if isinstance(data, (str, list)) else json.dumps(data)

def found(s, *kinds):
    "What of `kinds` (none: of all) is in a text, and where"
    return [f'{k}: {s[max(m.start()-20, 0):m.end()+60]!r}' for k in kinds or debris if (m := debris[k].search(s))]

def in_notebook(nb):
    "What is left over in the outputs of a notebook, a dict, with the number of the cell"
    for i,cell in enumerate(nb['cells']):
        for out in cell.get('outputs', []):
            if out['output_type'] == 'stream' and out.get('name') == 'stderr': yield f'cell {i}: stderr: {text(out["text"])[:80]!r}'
            for s in texts(out): yield from (f'cell {i}: {o}' for o in found(s))

def check(paths): return [f'{p.name}: {o}' for p in paths for o in in_notebook(json.loads(p.read_text(encoding='utf-8')))]

def in_site(folder):
    "Files of a site that name a path of the machine it was built on, or an address of an object; pictures are left out"
    for p in sorted(folder.rglob('*')):
        if p.suffix not in ('.html', '.json', '.txt', '.xml', '.md'): continue
        s = re.sub(r'data:image/[\w+]+;base64,[\w+/=]+', '', p.read_text(encoding='utf-8'))
        yield from (f'{p.relative_to(folder)}: {o}' for o in found(s, 'a local path', 'an address of an object'))

def notebooks(): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(root).parts))

def main(argv): return '\n'.join(check([Path(o) for o in argv] or notebooks())) or None

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
