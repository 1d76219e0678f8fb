#!/usr/bin/env python3
"""Build the documentation site from the notebooks into `_docs/`, offline, and check it: `python .ci/docs.py`.

nbdev adds API entries and links, smalldocs renders, math-core makes MathML of formulas. With Quarto, `nbdev-docs` makes the same site."""
import html, links, re, shutil, sys, tomllib, warnings, yaml
from importlib.resources import files
from pathlib import Path

from fastcore.nbio import read_nb, write_nb
from fontTools import subset
from math_core import LatexToMathML
from nbdev.serve import proc_nbs
from smalldocs.cli import main as smalldocs

warnings.filterwarnings('ignore', category=FutureWarning) # fastai's own use of torch.jit.script, which a page would show
root = Path(__file__).resolve().parent.parent
repo = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']['Repository']
no_address = repo.startswith('https://example.org/')   # until the project has one, a link to its source would lead nowhere
NUMBERED = r'\d+[a-zA-Z0-9]*_(?=\w+\.ipynb)'           # 01_losses.ipynb is the page losses.html, as nbdev has it

def local_links(md):
    "Links between notebooks, from any folder to any other, by the names of their pages"
    md = re.sub(rf'(\]\((?:[\w.-]+/)*){NUMBERED}', r'\1', md)
    return re.sub(rf'\[source\]\({re.escape(repo)}[^)]*\)(?:\{{[^}}]*\}})?', '', md) if no_address else md

def api_entry(md):
    "An entry of the API: its examples are code (to Markdown `>>> f(x)` is a quote in a quote), and no class is `__main__`'s to a reader"
    md = re.sub(r'\b__main__\.', '', local_links(md))
    return re.sub(r'(?ms)^ *```.*?^ *```|^>>> [^\n]*(?:\n[^\n]+)*', lambda m: f'```python\n{m[0]}\n```' if m[0][0] == '>' else m[0], md)

def for_pages(src):
    "Gives a processed notebook the name of its page, and links that lead to pages"
    nb = read_nb(src)
    for cell in nb.cells:
        if cell.cell_type != 'code': cell.source = re.sub(r'(?m)^output-file:.*\n', '', local_links(cell.source))
        for data in (out.data for out in cell.get('outputs', []) if 'data' in out):
            if 'text/markdown' in data: data['text/markdown'] = api_entry(data['text/markdown'])
    src.unlink()
    write_nb(nb, src.with_name(re.sub(NUMBERED, '', src.name)))

def for_smalldocs(proc):
    "The options of the site in `_quarto.yml`, without those of Quarto alone: so every warning that is left is an error"
    read = lambda name: yaml.safe_load(re.sub(rf'\b{NUMBERED}', '', (proc/name).read_text(encoding='utf-8')))
    ours, nbdev = read('_quarto.yml'), read('nbdev.yml')
    page = {k: v for k, v in ours['format']['html'].items() if k not in ('keep-md', 'html-math-method')}
    site = {k: v for k, v in (nbdev['website'] | ours['website']).items() if not no_address or k not in ('site-url', 'repo-url', 'repo-branch')}
    (proc/'_quarto.yml').write_text(yaml.safe_dump(dict(project=ours['project'] | nbdev['project'], format=dict(html=page), website=site), sort_keys=False))

def maths_font(folder):
    "`maths.css`, and `maths.woff` with the larger forms of brackets, sums and braces, a font that Linux and phones often lack"
    (folder/'maths.css').write_text('@font-face { font-family: "STIX Two Math"; src: local("STIX Two Math"), url(maths.woff); }\n'
                                    'math { font-family: "STIX Two Math", math; font-size: 1.1em; }\n', encoding='utf-8')
    subset.main([str(files('ziamath')/'fonts/STIXTwoMath-Regular.ttf'), '--unicodes=20-17F,2B0-338,370-3FF,2010-23FF,27E6-27EF,1D400-1D7FF',
                 '--no-hinting', '--drop-tables+=FFTM', '--name-IDs=*', '--flavor=woff', f'--output-file={folder/"maths.woff"}'])

def offline_maths(page, root='./'):
    "A page with formulas as MathML, and without the scripts that would fetch KaTeX to draw them; `root` leads from it to the site"
    page = re.sub(r'<script[^>]*/katex@[^>]*></script>', '', page)
    page = re.sub(r'<link[^>]*/katex@[^>]*>', f'<link rel="stylesheet" href="{root}site_libs/maths.css">', page)
    tex = LatexToMathML(fancy_error=False, annotation=True)   # TeX that it does not understand is a LatexError
    def drawn(m):
        res = tex.convert_with_local_state(html.unescape(m[3]).strip(), displaystyle=m[2] == 'display')
        return m[1] + res.replace('<mover accent="true">', '<mover>') + m[4] + '</span>' # Chromium draws an accent into its letter
    # the comma after a formula goes into its element, where the line does not break
    return re.sub(r'(<span class="math (inline|display)">)\\[\[(](.*?)\\[\])]</span>([,.;:!?)]*)', drawn, page, flags=re.S)

def columns(page):
    "Marks what was printed in columns, which scrolls; other code and output wraps"
    def block(m): return f'<pre class="columns">{m[1]}' if len(re.findall(r'\S {2,}\S', m[1])) > 2 else m[0]
    return re.sub(r'<pre>(<code>.*?</code></pre>)', block, page, flags=re.S)

def contents(page):
    "The contents above the text, which are for narrow screens, as a list that folds"
    return re.sub(r'(<nav id="TOC-body"[^>]*>)<h2>(.*?)</h2>(.*?)</nav>',
                  r'\1<details><summary>\2</summary>\3</details></nav>', page, flags=re.S)

def build():
    proc, out = proc_nbs(root/'nbs', n_workers=0, force=True), root/'_docs'
    for src in sorted(proc.rglob('*.ipynb')): for_pages(src)
    for_smalldocs(proc)
    if code := smalldocs(['render', '--strict', str(proc)]): return code
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(proc/'_docs', out)
    maths_font(out/'site_libs')
    for p in out.rglob('*.html'):
        page = offline_maths(p.read_text(encoding='utf-8'), '../'*len(p.relative_to(out).parent.parts))
        p.write_text(contents(columns(page)), encoding='utf-8')
    return '\n'.join(links.check(out)) or None

if __name__ == '__main__': sys.exit(build())
