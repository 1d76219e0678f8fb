#!/usr/bin/env python3
"""Build the documentation site from the notebooks into `_docs/`, offline: `python .ci/docs.py`.

nbdev processes the notebooks (it adds the API entries and the links), smalldocs renders them. `nbdev-docs` makes the
same site where Quarto is installed; Quarto is no Python package, so CI and a fresh machine cannot count on it."""
import json, re, shutil, sys, tomllib, yaml
from pathlib import Path
from nbdev.serve import proc_nbs
from smalldocs.cli import main as smalldocs

root = Path(__file__).resolve().parent.parent
repo = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']['Repository']
# until the project has a public address, a link to its source would lead nowhere
no_address = repo.startswith('https://example.org/')

def page(nb):
    "The name that nbdev gives the page of a notebook: `01_losses.ipynb` is shown as `losses`"
    return re.sub(r'^\d+[a-zA-Z0-9]*_', '', nb.name)

def local_links(md):
    "Links between pages, as nbdev (`/losses.html`) and people (`01_losses.ipynb`) write them, relative to the site"
    md = re.sub(r'\]\(/(\w+\.html)', r'](\1', md)
    md = re.sub(r'\]\((?:\d+[a-zA-Z0-9]*_)?(\w+)\.ipynb', r'](\1.html', md)
    if no_address: md = re.sub(rf'\[source\]\({re.escape(repo)}[^)]*\)(?:\{{[^}}]*\}})?', '', md)
    return md

def localise(nb):
    "Make the links of a processed notebook local, in its Markdown cells and Markdown outputs"
    for cell in nb['cells']:
        if cell['cell_type'] == 'raw': cell['source'] = re.sub(r'(?m)^output-file:.*\n', '', ''.join(cell['source']))
        if cell['cell_type'] == 'markdown': cell['source'] = local_links(''.join(cell['source']))
        for data in (out.get('data', {}) for out in cell.get('outputs', [])):
            if 'text/markdown' in data: data['text/markdown'] = local_links(''.join(data['text/markdown']))
    return nb

def edit_yaml(path, edit):
    d = yaml.safe_load(path.read_text(encoding='utf-8'))
    edit(d)
    path.write_text(yaml.safe_dump(d, sort_keys=False), encoding='utf-8')

def for_smalldocs(quarto):
    "Leave out what only Quarto makes, so that every warning that is left is an error"
    quarto['format'].pop('commonmark', None)
    quarto['format']['html'].pop('keep-md', None)

def site_options(nbdev):
    nbdev.pop('format-links', None)
    if no_address:
        for k in 'site-url', 'repo-url', 'repo-branch': nbdev['website'].pop(k, None)

def build():
    proc = proc_nbs(root/'nbs', n_workers=0, force=True)
    nbs = sorted(proc.glob('*.ipynb'), key=lambda p: (p.name != 'index.ipynb', p.name))
    for src in nbs:
        nb = localise(json.loads(src.read_text(encoding='utf-8')))
        src.unlink()
        (proc/page(src)).write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    edit_yaml(proc/'_quarto.yml', for_smalldocs)
    edit_yaml(proc/'nbdev.yml', site_options)
    sidebar = {'website': {'sidebar': {'contents': [page(nb) for nb in nbs]}}}
    (proc/'sidebar.yml').write_text(yaml.safe_dump(sidebar), encoding='utf-8')
    if (code := smalldocs(['render', '--strict', str(proc)])): return code
    out = root/'_docs'
    if out.exists(): shutil.rmtree(out)
    shutil.move(proc/'_docs', out)
    shutil.rmtree(proc)
    if (missing := [page(nb) for nb in nbs if not (out/page(nb)).with_suffix('.html').exists()]):
        return f'no page was made of {missing}'
    print(f'{len(nbs)} pages in {out.relative_to(root)}/')

if __name__ == '__main__': sys.exit(build())
