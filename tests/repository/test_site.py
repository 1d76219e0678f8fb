"""The tools in .ci/: what they find stale or broken, and what they make of links, examples, formulas and README's cells."""
import importlib, json, shutil, sys
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

def elements(page, xpath): return importlib.import_module('lxml.html').document_fromstring(page).xpath(xpath)

@pytest.mark.parametrize('printed, is_table', [('a    b\n1    2\n3    4', True), ('a long sentence, which wraps\nand  another', False)])
def test_printed_columns_do_not_wrap(tool, printed, is_table):
    made = tool('docs').columns(f'<pre><code>{printed}</code></pre>')
    assert ('class="columns"' in made) == is_table and elements(made, 'string()') == printed

def test_a_page_has_an_icon_and_its_contents_twice(tool, tmp_path):
    docs, site = tool('docs'), tmp_path/'_docs'
    for name in '_quarto.yml', 'nbdev.yml', 'styles.css', 'favicon.svg': shutil.copy(ci.parent/'nbs'/name, tmp_path)
    (tmp_path/'index.md').write_text('# T\n\n## A\n\n### B.c\n')
    docs.for_smalldocs(tmp_path)
    docs.smalldocs(['render', str(tmp_path)])
    page = docs.contents((site/'index.html').read_text())
    assert [(site/o).is_file() for o in elements(page, '//link[@rel="icon"]/@href')] == [True]
    for place in '//*[@id="TOC"]', '//*[@id="TOC-body"]/details': assert [o.text_content() for o in elements(page, place + '//li/a')] == ['A', 'B.c']

def notebook(path, *cells):
    "Saves (source, outputs) of code cells, and of Markdown cells the source"
    made = [dict(cell_type='markdown', source=o) if isinstance(o, str) else dict(cell_type='code', source=o[0], outputs=o[1]) for o in cells]
    path.write_text(json.dumps(dict(cells=[dict(o, id=f'c{i}', metadata={}) for i, o in enumerate(made)], metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def shown(**data): return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})

def test_readme_is_made_of_cells(tool, tmp_path):
    noise, plain = dict(output_type='stream', name='stderr', text='noise'), shown(text_plain='1\n2')
    path = notebook(tmp_path/'i.ipynb', '# T\n> sub', '[l](01_losses.ipynb#x)', ('#| hide\nsecret()', []), ('#| echo: false\nm()', [shown(text_markdown='*m* [l](01_losses.ipynb)', text_plain='M')]),
                    ('#| echo: false\n#| fig-alt: A dot\nd()', [shown(image_png='ZG90\n')]), ('a', [plain, noise]))
    made = tool('readme').readme(path)
    assert made.pop('nbs/images/readme-1.png') == b'dot' and made == {'README.md': f'''# T\n\n\n{tool('readme').WARNING}\n
> sub\n\n[l](nbs/01_losses.ipynb#x)\n\n*m* [l](nbs/01_losses.ipynb)\n\n![A dot](nbs/images/readme-1.png)\n\n``` python\na\n```\n\n    1\n    2\n'''.encode()}

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

def copy_settings(path):
    "pyproject.toml, without the import of fastai that nbdev begins with"
    (path/'pyproject.toml').write_text(''.join(o for o in (ci.parent/'pyproject.toml').read_text().splitlines(True) if not o.startswith('test_setup')))

def test_a_page_is_run_as_it_is_pasted(tool, tmp_path):
    "without what is hidden or exported; then what shows no code"
    sources = '#| hide\nn = 1', '#| export\ndef f(): pass', '#| echo: false\ntable(n)', 'import m', 'show_doc(f)', 'f()'
    nb = tool('fastcore.nbio').read_nb(notebook(tmp_path/'a.ipynb', '# T', *((o, []) for o in sources)))
    assert [o.source for o in tool('notebooks').page(nb).cells] == ['import m', 'f()', 'from nbdev.showdoc import show_doc', '#| echo: false\ntable(n)', 'show_doc(f)']

@pytest.mark.parametrize('printed, kept', [
    ('a\n', 'a\n'), ('█ |--| 0%\r █ |██| 100%\r     \rT=0.7\n', 'T=0.7\n'), ('█epoch  train_loss  time\n█Epoch 1/2\r0  2.1  00:05\n', ''), (' 0%\r  \r', '')])
def test_progress_bars_are_not_saved(tool, printed, kept):
    out = tool('fastcore.nbio').AttrDict(name='stdout', text=printed)
    assert tool('notebooks').without_bars(out).text == kept

@pytest.mark.slow
def test_a_page_that_needs_a_hidden_cell_fails(tool, tmp_path, monkeypatch, capsys):
    notebooks = tool('notebooks')
    (tmp_path/'nbs').mkdir()
    copy_settings(tmp_path)
    path = notebook(tmp_path/'nbs/00_a.ipynb', '# T', ('#| hide\nn = 1', []), ('print(n)', [dict(output_type='stream', name='stdout', text='1\n')]))
    monkeypatch.setattr(notebooks, 'root', tmp_path)
    assert notebooks.main([]) == 1
    path.write_text(path.read_text().replace('#| hide', '#| eval: true'))
    assert notebooks.main([]) == 0
    path.write_text(path.read_text().replace('print(n)', "import sys; print('█ 50%', end=chr(13)); print(n, file=sys.stderr)"))
    assert notebooks.main(['--save']) == 0 and not tool('fastcore.nbio').read_nb(path).cells[-1].outputs

@pytest.mark.parametrize('vendor, python, source, cell', [
    ('AuthenticAMD', '3.11.7', 'from pydoc_data.topics import topics', None), ('AuthenticAMD', '3.12.1', 'from pydoc_data.topics import topics', 3),
    ('AuthenticAMD', '3.12.1', 'x = 1', None), ('GenuineIntel', '3.11.7', 'x = 1', 3)])
def test_which_cells_are_compared(tool, tmp_path, monkeypatch, vendor, python, source, cell):
    notebooks = tool('notebooks')
    monkeypatch.setattr(notebooks, 'HERE', dict(vendor=vendor, python=python))
    nb = notebook(tmp_path/'a.ipynb', '# T', ('#| export\ndef g(learn): learn.fit(1)', []), (source, []), ('learn.fit(1)', []), ('2', []))
    assert notebooks.first_foreign(notebooks.read_nb(nb)) == cell

@pytest.mark.slow
def test_a_stale_number_fails_and_is_saved_anew(tool, tmp_path, monkeypatch, capsys):
    notebooks, out = tool('notebooks'), dict(output_type='stream', name='stdout', text='accuracy 0.25\n')
    (tmp_path/'nbs').mkdir()
    copy_settings(tmp_path)
    path = notebook(tmp_path/'nbs/00_compare.ipynb', '# T', ('print(f"accuracy {1/8}") # after learn.fit(1)', [out]))
    monkeypatch.setattr(notebooks, 'root', tmp_path)
    monkeypatch.setattr(notebooks, 'HERE', notebooks.SAVED_ON)
    assert notebooks.main([]) and 'nbs/00_compare.ipynb, cell 1 (c1):\n  saved: accuracy 0.25\n  now:   accuracy 0.125' in capsys.readouterr().out
    monkeypatch.setattr(notebooks, 'HERE', notebooks.SAVED_ON | dict(python='3.9.0'))
    assert notebooks.main([])   # no help texts in it
    monkeypatch.setattr(notebooks, 'HERE', notebooks.SAVED_ON | dict(vendor='another'))
    assert not notebooks.main([]) and not notebooks.main(['--save']) and 'accuracy 0.125' in path.read_text()
    path.write_text(path.read_text().replace('1/8', '1/0'))
    assert notebooks.main([])   # one that fails
