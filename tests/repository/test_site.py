"""The tools in .ci/: what they find stale or broken, and what they make of links, examples, formulas and README's cells."""
import importlib, json, sys
from pathlib import Path

import pytest

ci = Path(__file__).resolve().parents[2]/'.ci'
pytestmark = pytest.mark.skipif(not ci.exists(), reason='needs a checkout')

@pytest.fixture
def tool(monkeypatch):
    "Imports a module of .ci/, where what it needs is installed"
    monkeypatch.syspath_prepend(ci)
    for needed in 'fastcore.nbio', 'lxml', 'tomllib', 'smalldocs', 'math_core', 'nbdev.serve': pytest.importorskip(needed)
    yield importlib.import_module
    for name in 'docs', 'links', 'readme', 'notebooks': sys.modules.pop(name, None)

good = '<a href="b.html#x">b</a><a href="sub/c.html">c</a><a href="#top">up</a><a href="https://arxiv.org/abs/1512.00567">a</a>'

@pytest.mark.parametrize('added, why', [
    ('', None), ('<img src="data:image/png;base64,AA">', None), ('<a href="mailto:a@b.org">', None), ('<pre>[a](b.ipynb)</pre>', None),
    *[(f'<a href="{o}">', f'{o}: there is no such file in the site') for o in ('none.html', '../out.html', '/b.html', '01_losses.ipynb')],
    *[(f'<a href="{o}">', f'{o}: there is no such anchor') for o in ('b.html#none', '#none')],
    *[(f'<a href="{o}">', f'{o}: no address') for o in ('https://example.org/x', 'http:/arxiv.org', 'file:///etc')],
    ('<img src="no.png">', 'no.png: there is no such file in the site'), ('<p style="background: url(no.png)">', 'no.png: there is no such file in the site'),
    *[(o, 'https://cdn.net/k: loaded from another site') for o in ('<script src="https://cdn.net/k"></script>', '<style>@import "https://cdn.net/k";</style>')],
    ('<p>[<code>f</code>](../f.ipynb)', '](../f.ipynb): a link that is shown as it is written'), ('&lt;f at 0x7f01a2b3c4d5&gt;', '0x7f01a2b3c4d5: of the machine that built it')])
def test_bad_links_are_named_with_their_page(tool, tmp_path, added, why):
    (tmp_path/'sub').mkdir()
    (tmp_path/'b.html').write_text('<h2 id="x">X</h2><link rel="stylesheet" href="s.css">')
    (tmp_path/'sub/c.html').write_text('<a href="../index.html">up</a><a name="y" href="#y">y</a>')
    (tmp_path/'s.css').write_text('b { background: url(s.css?v=1) }')
    (tmp_path/'index.html').write_text(good + added)
    assert tool('links').check(tmp_path) == ([f'index.html: {why}'] if why else [])
    (tmp_path/'s.css').write_text('@import url(https://fonts.net/f.css);')
    assert 's.css: https://fonts.net/f.css: loaded from another site' in tool('links').check(tmp_path)

@pytest.mark.parametrize('md, expected', [
    ('[a](01_losses.ipynb)', '[a](losses.ipynb)'), ('[a](../09_measures.ipynb#nll)', '[a](../measures.ipynb#nll)'), ('[a](https://a.org/01_x.ipynb)', '[a](https://a.org/01_x.ipynb)'),
    ('x [source](https://example.org/fastai_smooth/fastai_smooth/blob/main/a.py#L1){target="_blank"} y', 'x  y'),
    ('T\n\n>>> f(1)\n2\n\nMore > text', 'T\n\n```python\n>>> f(1)\n2\n```\n\nMore > text'), ('```python\n>>> f(1)\n```', '```python\n>>> f(1)\n```')])
def test_entries_of_the_api_have_links_to_pages_and_examples_as_code(tool, md, expected): assert tool('docs').api_entry(md) == expected

def test_formulas_become_mathml(tool):
    docs = tool('docs')
    page = '<link href="https://c.net/katex@0/k.css"><script src="https://c.net/katex@0/k.js"></script><span class="math inline">\\(a &lt; b\\)</span>), so'
    made = docs.offline_maths(page, '../')
    assert made.startswith('<link rel="stylesheet" href="../site_libs/maths.css"><span class="math inline"><math>')
    assert '<mo>&lt;</mo>' in made and made.endswith('</math>),</span> so') and 'c.net' not in made
    with pytest.raises(Exception, match='nosuch'): docs.offline_maths('<span class="math inline">\\(\\nosuch\\)</span>')

def notebook(path, *cells):
    "Saves (source, outputs) of code cells, and of Markdown cells the source"
    made = [dict(cell_type='markdown', source=o) if isinstance(o, str) else dict(cell_type='code', source=o[0], outputs=o[1]) for o in cells]
    path.write_text(json.dumps(dict(cells=[dict(o, id=f'c{i}', metadata={}) for i, o in enumerate(made)], metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def shown(**data): return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})

def test_readme_is_made_of_cells(tool, tmp_path):
    noise, plain = dict(output_type='stream', name='stderr', text='noise'), shown(text_plain='1\n2')
    path = notebook(tmp_path/'i.ipynb', '# T\n> sub', '[l](01_losses.ipynb#x)', ('#| hide\nsecret()', []), ('#| echo: false\nm()', [shown(text_markdown='*m*', text_plain='M')]),
                    ('#| echo: false\n#| fig-alt: A dot\nd()', [shown(image_png='ZG90\n')]), ('a', [plain, noise]))
    made = tool('readme').readme(path)
    assert made.pop('nbs/images/readme-1.png') == b'dot' and made == {'README.md': f'''# T\n\n\n{tool('readme').WARNING}\n
> sub\n\n[l](nbs/01_losses.ipynb#x)\n\n*m*\n\n![A dot](nbs/images/readme-1.png)\n\n``` python\na\n```\n\n    1\n    2\n'''.encode()}

def test_readme_is_up_to_date(tool):
    for path, content in tool('readme').readme().items(): assert (ci.parent/path).read_bytes() == content, f'{path}: run `python .ci/readme.py`'

@pytest.mark.parametrize('saved, now, is_same', [
    ('NLL 0.4213', 'NLL 0.4100', True), ('NLL 0.4213', 'NLL 0.3900', False), ('T 0.42', 'T 0.4213', True), ('gap +0.0002', 'gap -0.0000', True),
    ('gap +0.0042', 'gap -0.0042', False), ('0.00', '0.02', True), ('0.00', '0.03', False), ('1e-7', '1.02e-7', True), ('1e-7', '3e-7', False),
    ('2 of 10', '3 of 10', False), ('1,797 rows', '1,790 rows', True), ('T  0.421', 'T 0.421', True), ('T 0.421', 'S 0.421', False), ('0.1 0.2', '0.1', False),
    ('nan', '0.1', False), ('float32', 'float64', False), ('<td>0.14</td>', '<td>0.09</td>', False), ('[source](a#L1) f', '[source](a#L2) f', True)])
def test_numbers_agree_within_a_tolerance(tool, tmp_path, saved, now, is_same):
    a, b = (tool('fastcore.nbio').read_nb(notebook(tmp_path/'a.ipynb', '# T', ('run()', [shown(text_plain='x\n' + o)]))) for o in (saved, now))
    assert bool([*tool('notebooks').stale(a, b)]) != is_same

@pytest.mark.slow
def test_a_stale_number_fails_and_is_saved_anew(tool, tmp_path, monkeypatch, capsys):
    notebooks, out = tool('notebooks'), dict(output_type='stream', name='stdout', text='accuracy 0.25\n')
    (tmp_path/'nbs').mkdir()
    (tmp_path/'pyproject.toml').write_text(''.join(o for o in (ci.parent/'pyproject.toml').read_text().splitlines(True) if not o.startswith('test_setup')))
    path = notebook(tmp_path/'nbs/00_compare.ipynb', '# T', ('print(f"accuracy {1/8}")', [out]))
    monkeypatch.setattr(notebooks, 'root', tmp_path)
    monkeypatch.setattr(notebooks, 'PROCESSOR', notebooks.SAVED_ON)
    assert notebooks.main([]) and 'nbs/00_compare.ipynb, cell 1 (c1):\n  saved: accuracy 0.25\n  now:   accuracy 0.125' in capsys.readouterr().out
    monkeypatch.setattr(notebooks, 'PROCESSOR', 'another')
    assert not notebooks.main([]) and not notebooks.main(['--save']) and 'accuracy 0.125' in path.read_text()
    path.write_text(path.read_text().replace('1/8', '1/0'))
    assert notebooks.main([])   # one that fails
