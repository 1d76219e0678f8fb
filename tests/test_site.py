"""The small parts of the documentation's build, in .ci/: what it finds wrong, and what it makes of links, examples and formulas."""
import importlib, sys
from pathlib import Path

import pytest

ci = Path(__file__).resolve().parent.parent/'.ci'
pytestmark = pytest.mark.skipif(not ci.exists(), reason='needs a checkout')

@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ci)
    yield importlib.import_module
    for name in 'docs', 'links', 'debris', 'readme': sys.modules.pop(name, None)

@pytest.fixture
def docs(tool):
    for needed in 'tomllib', 'smalldocs', 'math_core', 'nbdev.serve': pytest.importorskip(needed)
    return tool('docs')

good = '<a href="b.html#x">b</a><a href="sub/c.html">c</a><a href="#top">up</a><a href="https://arxiv.org/abs/1512.00567">a</a>'

@pytest.fixture
def site(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'index.html').write_text(good)
    (tmp_path/'b.html').write_text('<h2 id="x">X</h2><link rel="stylesheet" href="s.css"><img src="data:image/png;base64,AA==">')
    (tmp_path/'sub/c.html').write_text('<a href="../index.html">up</a><a name="y" href="#y">y</a>')
    (tmp_path/'s.css').write_text('a { background: url("data:image/svg+xml,x") } b { background: url(s.css?v=1) }')
    (tmp_path/'search.json').write_text('[{"href": "b.html#x"}]')
    return tmp_path

def test_good_links_pass(tool, site): assert tool('links').check(site) == []

@pytest.mark.parametrize('added,why', [
    ('<a href="none.html">', 'none.html: there is no such file'),
    ('<a href="b.html#none">', 'b.html#none: there is no such anchor'),
    ('<a href="#none">', '#none: there is no such anchor'),
    ('<a href="../out.html">', '../out.html: outside the site'),
    ('<a href="/b.html">', '/b.html: from the root of the server, where the site need not be'),
    ('<a href="01_losses.ipynb">', '01_losses.ipynb: there is no such file'),
    ('<img src="no.png">', 'no.png: there is no such file'),
    ('<img srcset="s.css 1x, no.png 2x">', 'no.png: there is no such file'),
    ('<script src="https://cdn.net/k.js"></script>', 'https://cdn.net/k.js: loaded from another site'),
    ('<script>import "https://cdn.net/k.js"</script>', 'https://cdn.net/k.js: loaded from another site'),
    ('<link rel="stylesheet" href="//cdn.net/k.css">', '//cdn.net/k.css: loaded from another site'),
    ('<style>@import "https://cdn.net/f.css";</style>', 'https://cdn.net/f.css: loaded from another site'),
    ('<p style="background: url(no.png)">', 'no.png: there is no such file'),
    ('<a href="https://example.org/x">', 'https://example.org/x: a placeholder'),
    ('<a href="http:/arxiv.org">', "http:/arxiv.org: no host ''"),
    ('<a href="https://a b.org/">', "https://a b.org/: no host 'a b.org'"),
    ('<p>[<code>f</code>](../f.ipynb) and <code>g[0](1)</code>', '](../f.ipynb): a link that is shown as it is written'),
    ('<a href="file:///etc">', "file:///etc: unknown scheme 'file'")])
def test_bad_link_is_named_with_its_page(tool, site, added, why):
    (site/'index.html').write_text(good + added)
    assert tool('links').check(site) == [f'index.html: {why}']

def test_style_sheets_search_index_and_lonely_pages_are_checked(tool, site):
    (site/'s.css').write_text('@import url(https://fonts.net/f.css);')
    (site/'search.json').write_text('[{"href": "b.html#none"}]')
    (site/'lonely.html').write_text('<a href="lonely.html">')
    assert set(tool('links').check(site)) == {
        's.css: https://fonts.net/f.css: loaded from another site', 'search.json: b.html#none: there is no such anchor',
        'lonely.html: no page links to it'}

HOME, ROOT, TMP = ('/' + o for o in ('home', 'root', 'tmp'))   # another test finds local paths in files

def notebook(**out): return {'cells': [{'cell_type': 'code', 'source': '1', 'outputs': [out]}]}

@pytest.mark.parametrize('s,what', [
    (HOME + '/me/x.py:3', 'a local path'), ('UserWarning: look', 'a warning'), ('  50%|█████', 'a progress bar'), ('a\rb', 'a progress bar'),
    ('<style>.progress-bar-interrupted {}</style>', 'a progress bar'), ('Traceback (most recent call last):', 'a traceback'),
    ('<torch.Generator object at 0x7f01a2b3c4d5>', 'an address of an object'), ('\x1b[31mred', 'a colour of a terminal')])
def test_debris_is_found(tool, s, what):
    debris = tool('debris')
    for nb in (notebook(output_type='stream', name='stdout', text=['ok\n', s]),
               notebook(output_type='execute_result', data={'text/html': s, 'image/png': HOME + '/x'})):
        (found,) = debris.in_notebook(nb)
        assert found.startswith(f'cell 0: {what}: ')

def test_stderr_and_errors_are_debris(tool):
    debris = tool('debris')
    assert [*debris.in_notebook(notebook(output_type='stream', name='stderr', text='hm'))] == ["cell 0: stderr: 'hm'"]
    assert len([*debris.in_notebook(notebook(output_type='error', ename='E', evalue='', traceback=['E']))]) == 1

@pytest.mark.parametrize('s', ['0.9721 ± 0.0056', 'a' + HOME + '/b', 'https://a.org' + HOME + '/x', '..' + TMP + '/x', 'lr 0x10', 'warnings: 3',
                               'a\r\nb', '<div><style scoped>'])
def test_plain_output_is_no_debris(tool, s): assert [*tool('debris').in_notebook(notebook(output_type='stream', name='stdout', text=s))] == []

def test_saved_outputs_are_clean(tool):
    debris = tool('debris')
    assert debris.notebooks() and not debris.check(debris.notebooks())

def test_machine_paths_and_addresses_in_a_site_are_found(tool, tmp_path):
    (tmp_path/'a.html').write_text(f'<img src="data:image/png;base64,AA{HOME}/BB"> see {ROOT}/x.py')
    (tmp_path/'b.html').write_text('def f()-&gt;&lt;function ft at 0x7f832aa02520&gt;')
    path,address = tool('debris').in_site(tmp_path)
    assert path.startswith('a.html: a local path') and address.startswith('b.html: an address')

@pytest.mark.parametrize('md,expected', [
    ('[a](01_losses.ipynb)', '[a](losses.ipynb)'), ('[a](../05_calibration.ipynb#nll)', '[a](../calibration.ipynb#nll)'),
    ('[a](tutorials/moving.ipynb)', '[a](tutorials/moving.ipynb)'), ('[a](https://a.org/01_x.ipynb)', '[a](https://a.org/01_x.ipynb)'),
    ('x [source](https://example.org/fastai_smooth/fastai_smooth/blob/main/a.py#L1){target="_blank"} y', 'x  y')])
def test_links_lead_to_pages(docs, md, expected): assert docs.local_links(md) == expected

def test_examples_are_fenced_once(docs):
    assert docs.fenced('Text\n\n>>> f(1)\n2\n>>> f(2)\n3\n\nMore > text') == 'Text\n\n```python\n>>> f(1)\n2\n>>> f(2)\n3\n```\n\nMore > text'
    fenced = '```python\n>>> f(1)\n```'
    assert docs.fenced(fenced) == fenced

def test_formulas_become_mathml(docs):
    page = '<link href="https://c.net/katex@0/k.css"><script src="https://c.net/katex@0/k.js"></script>'
    page += '<span class="math inline">\\(a &lt; b\\)</span>), so'
    made = docs.offline_maths(page, '../')
    assert made.startswith('<link rel="stylesheet" href="../site_libs/maths/maths.css"><span class="math inline"><math>')
    assert '<mo>&lt;</mo>' in made and made.endswith('</math>),</span> so') and 'c.net' not in made
    assert '<math display="block">' in docs.offline_maths('<span class="math display">\\[a\\]</span>')
    with pytest.raises(Exception, match='nosuch'): docs.offline_maths('<span class="math inline">\\(\\nosuch\\)</span>')

def test_imports_stand_alone_where_the_api_is_shown(docs):
    def nb(*sources): return {'cells': [{'cell_type': 'code', 'source': s} for s in sources]}
    assert len([*docs.mixed(nb('#| export\nimport x\nx.y()', 'import z\nz.bench()', 'import z', '#| hide\nimport nbdev; nbdev.nbdev_export()'))]) == 1
    assert not [*docs.mixed(nb('import z\nz.bench()'))]

def test_options_of_cells_are_yaml(docs):
    def nb(s): return {'cells': [{'cell_type': 'code', 'source': s}]}
    assert len([*docs.misspelt(nb('#| echo: false\n#| fig-alt: two plots: one, two\nf()'))]) == 1
    assert not [*docs.misspelt(nb('#| hide\n#| fig-alt: "two plots: one, two"\nf() # a: b: c'))]

def test_every_notebook_is_in_the_sidebar(docs): assert not docs.unlisted(docs.debris.notebooks())

@pytest.mark.parametrize('link,expected', [
    ('01_losses.ipynb', 'nbs/01_losses.ipynb'), ('tutorials/moving.ipynb#x', 'nbs/tutorials/moving.ipynb#x'),
    ('https://a.org/x.ipynb', 'https://a.org/x.ipynb')])
def test_links_of_readme_lead_to_notebooks(tool, link, expected): assert tool('readme').markdown(f'[a]({link})') == f'[a]({expected})'
