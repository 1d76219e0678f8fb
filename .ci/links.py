"Does every link of a site lead somewhere, and is it whole without a network? smalldocs checks links of Markdown cells, not anchors and HTML."
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lxml.html import document_fromstring

MACHINE = r'(?<![\w.:/-])/(?:work|root|home|tmp|Users|mnt|private)/[\w.-]+|\b0x[0-9a-fA-F]{8,}\b'   # a path, or the address of an object

def faults(p, doc, folder, anchors):
    "What is wrong on a page, or in a style sheet"
    for el, _, url, _ in doc.iterlinks():
        u = urlsplit(url.strip())
        to = (p.parent/unquote(u.path)).resolve() if u.path and not u.scheme else p
        if el.tag != 'a' and (u.netloc or u.scheme not in ('', 'data')): yield f'{url}: loaded from another site'
        elif u.scheme in ('', 'data', 'mailto') and not u.netloc:
            if not to.is_file() or not to.is_relative_to(folder): yield f'{url}: there is no such file in the site'
            elif u.fragment and unquote(u.fragment) not in anchors.get(to, u.fragment): yield f'{url}: there is no such anchor'
        elif not u.hostname or 'example.' in u.hostname: yield f'{url}: no address'
    prose = '//text()[not(ancestor::pre or ancestor::code or ancestor::annotation or ancestor::style or ancestor::script)]'
    yield from (f'{o}: a link that is shown as it is written' for o in re.findall(r'\]\([^)\s]*\)', '\n'.join(doc.xpath(prose))))
    yield from (f'{o}: of the machine that built it' for o in re.findall(MACHINE, doc.text_content()))

def check(folder):
    "What is wrong with the site in `folder`: lines that name the page"
    folder = Path(folder).resolve()
    texts = {p: p.read_text(encoding='utf-8') for p in sorted(folder.rglob('*')) if p.suffix in ('.html', '.css')}
    docs = {p: document_fromstring(o if p.suffix == '.html' else f'<style>{o}</style>') for p, o in texts.items()}
    anchors = {p: {'top', *doc.xpath('//@id | //a/@name')} for p, doc in docs.items()}
    return [f'{p.relative_to(folder)}: {o}' for p, doc in docs.items() for o in dict.fromkeys(faults(p, doc, folder, anchors))]
