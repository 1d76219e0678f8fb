#!/usr/bin/env python3
"""Build the documentation site from the notebooks into `_docs/`, offline: `python .ci/docs.py`.

nbdev processes the notebooks (it adds the API entries and the links), smalldocs renders them, math-core turns the formulas into
MathML, which browsers draw without a script, and the result is checked. `nbdev-docs` makes the same site where Quarto is
installed; Quarto is no Python package, so CI and a fresh machine cannot count on it."""
import ast, html, json, re, shutil, sys, tomllib, yaml
from pathlib import Path
import debris, links
from fontTools import subset
from importlib.resources import files
from math_core import LatexToMathML
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
    "Links between notebooks, from any folder to any other, by the names of their pages"
    md = re.sub(r'(\]\((?:[\w.-]+/)*)\d+[a-zA-Z0-9]*_(\w+\.ipynb)', r'\1\2', md)
    if no_address: md = re.sub(rf'\[source\]\({re.escape(repo)}[^)]*\)(?:\{{[^}}]*\}})?', '', md)
    return md

def fenced(md):
    "Examples of docstrings as code: to Markdown `>>> f(x)` is a quote in a quote in a quote"
    return re.sub(r'(?ms)^ *```.*?^ *```|^>>> [^\n]*(?:\n[^\n]+)*', lambda m: f'```python\n{m[0]}\n```' if m[0][0] == '>' else m[0], md)

def api_entry(md):
    "An entry of the API: classes that a notebook makes are not `__main__`'s to a reader"
    return fenced(re.sub(r'\b__main__\.', '', local_links(md)))

def localise(nb):
    "A processed notebook with links, in its Markdown cells and Markdown outputs, that lead to the pages of the site"
    for cell in nb['cells']:
        if cell['cell_type'] == 'raw': cell['source'] = re.sub(r'(?m)^output-file:.*\n', '', ''.join(cell['source']))
        if cell['cell_type'] == 'markdown': cell['source'] = local_links(''.join(cell['source']))
        for data in (out.get('data', {}) for out in cell.get('outputs', [])):
            if 'text/markdown' in data: data['text/markdown'] = api_entry(''.join(data['text/markdown']))
    return nb

# TeX that it does not understand is a LatexError
tex = LatexToMathML(fancy_error=False, annotation=True)

# Browsers need a font with the larger forms of brackets, sums and braces. Linux often has none, a phone may have none
maths_css = """@font-face { font-family: "STIX Two Math"; src: local("STIX Two Math"), url(maths.woff); }
math { font-family: "STIX Two Math", math; font-size: 1.1em; }
"""

def maths_font(folder):
    "What a page with formulas loads: `maths.css`, and letters, Greek, operators and their larger forms as `maths.woff`"
    folder.mkdir()
    (folder/'maths.css').write_text(maths_css, encoding='utf-8')
    subset.main([str(files('ziamath')/'fonts/STIXTwoMath-Regular.ttf'), '--unicodes=20-17F,2B0-338,370-3FF,2010-23FF,27E6-27EF,1D400-1D7FF',
                 '--no-hinting', '--drop-tables+=FFTM', '--name-IDs=*', '--flavor=woff', f'--output-file={folder/"maths.woff"}'])

def offline_maths(page, root='./'):
    "A page with formulas as MathML, and without the scripts that would fetch KaTeX to draw them; `root` leads from it to the site"
    page = re.sub(r'<link[^>]*/katex@[^>]*>', f'<link rel="stylesheet" href="{root}site_libs/maths/maths.css">', page)
    page = re.sub(r'<script[^>]*/katex@[^>]*></script>', '', page)
    def drawn(m):
        res = tex.convert_with_local_state(html.unescape(m[3]).strip(), displaystyle=m[2] == 'display')
        return m[1] + res.replace('<mover accent="true">', '<mover>') + m[4] + '</span>' # Chromium draws an accent into its letter
    # the comma after a formula goes into its element, where the line does not break
    return re.sub(r'(<span class="math (inline|display)">)\\[\[(](.*?)\\[\])]</span>([,.;:!?)]*)', drawn, page, flags=re.S)

def edit_yaml(path, edit):
    d = yaml.safe_load(path.read_text(encoding='utf-8'))
    edit(d)
    path.write_text(yaml.safe_dump(d, sort_keys=False), encoding='utf-8')

def for_smalldocs(quarto):
    "Leave out what only Quarto makes, so that every warning that is left is an error"
    quarto['format'].pop('commonmark', None)
    for k in 'keep-md', 'html-math-method': quarto['format']['html'].pop(k, None)

def site_options(nbdev):
    nbdev.pop('format-links', None)
    if no_address:
        for k in 'site-url', 'repo-url', 'repo-branch': nbdev['website'].pop(k, None)

def shown(contents):
    "The notebooks that a sidebar lists"
    for o in contents:
        if isinstance(o, str): yield o
        else: yield from shown(o['contents']) if 'contents' in o else [o['href']]

def mixed(nb):
    "Cells with imports and other code. To show the API, nbdev runs cells with imports whole: a benchmark, say, at each build"
    sources = [''.join(cell['source']) for cell in nb['cells'] if cell['cell_type'] == 'code']
    if not any(re.search(r'(?m)^#\| *exports?\b|^show_doc\(', s) for s in sources): return # nothing to show, nothing is run
    for s in sources:
        if re.search(r'(?m)^#\| *(export|eval: *false)|nbdev_export\(\)|^[!%]', s): continue
        kinds = {type(o) for o in ast.parse(s).body}
        if kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}: yield f'imports and other code in one cell:\n{s}'

def misspelt(nb):
    "Options of cells, `#| echo: false`, that are no YAML: a colon in a caption wants quotes. None of the cell's options would count"
    for s in (''.join(cell['source']) for cell in nb['cells'] if cell['cell_type'] == 'code'):
        for option in re.findall(r'(?m)^#\| *([\w-]+: .*)$', s):
            try: yaml.safe_load(option)
            except yaml.YAMLError: yield f'an option that is no YAML: {option}'

def at_fault(nb): return [*mixed(nb), *misspelt(nb)]

def unlisted(nbs):
    "Notebooks that the sidebar does not list, and those that it lists and that are not there"
    sidebar = set(shown(yaml.safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']))
    return sidebar ^ {nb.relative_to(root/'nbs').as_posix() for nb in nbs}

def build():
    nbs = debris.notebooks()
    if odd := unlisted(nbs): return f'the sidebar in nbs/_quarto.yml and the notebooks differ in {sorted(odd)}'
    if left := debris.check(nbs): return '\n'.join(left)
    if odd := [f'{nb.name}: {o}' for nb in nbs for o in at_fault(json.loads(nb.read_text(encoding='utf-8')))]: return '\n'.join(odd)
    proc = proc_nbs(root/'nbs', n_workers=0, force=True)
    for src in sorted(proc.rglob('*.ipynb')):
        nb = localise(json.loads(src.read_text(encoding='utf-8')))
        src.unlink()
        src.with_name(page(src)).write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    quarto = proc/'_quarto.yml'
    quarto.write_text(re.sub(r'\b\d+[a-zA-Z0-9]*_(\w+\.ipynb)', r'\1', quarto.read_text(encoding='utf-8')), encoding='utf-8')
    edit_yaml(quarto, for_smalldocs)
    edit_yaml(proc/'nbdev.yml', site_options)
    if code := smalldocs(['render', '--strict', str(proc)]): return code
    out = root/'_docs'
    if out.exists(): shutil.rmtree(out)
    shutil.move(proc/'_docs', out)
    shutil.rmtree(proc)
    maths_font(out/'site_libs/maths')
    for p in out.rglob('*.html'):
        up = '../'*len(p.relative_to(out).parent.parts)
        p.write_text(offline_maths(p.read_text(encoding='utf-8'), up), encoding='utf-8')
    made = {p.relative_to(out) for p in out.rglob('*.html')}
    wrong = [f'no page was made of {nb.name}' for nb in nbs if nb.relative_to(root/'nbs').with_name(page(nb)).with_suffix('.html') not in made]
    wrong += [*links.check(out), *debris.in_site(out)]
    if wrong: return '\n'.join(wrong)
    print(f'{len(made)} pages in {out.relative_to(root)}/')

if __name__ == '__main__': sys.exit(build())
