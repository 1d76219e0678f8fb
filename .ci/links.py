#!/usr/bin/env python3
"""Does every link of the built site lead somewhere? `python .ci/links.py [folder]`, by default `_docs/`.

Pages, anchors and files that a page or the search index names must exist, a page must be linked from another one, and nothing
may be loaded from another site, so that the pages are whole without a network. Links to other sites must be well formed; they
are not fetched, as a check that needs the network fails for reasons that are not ours. The standard library is enough for that."""
import json, re, sys
from collections import namedtuple
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

Ref = namedtuple('Ref', 'url loaded')
url_attrs = 'href', 'src', 'srcset', 'data', 'poster', 'action', 'xlink:href'
followed = 'a', 'area', 'form' # a reader goes there; what other elements name, the browser loads
as_it_is = 'pre', 'code', 'annotation', 'style', 'script' # elements whose text is no prose
css_url = re.compile(r'''url\(\s*(?:"([^"]*)"|'([^']*)'|([^)]*?))\s*\)|@import\s*["']([^"']+)''')
in_script = re.compile(r'''https?://[^\s'"`<>]+''')

def css_refs(css): return [Ref(next(filter(None, m), ''), True) for m in css_url.findall(css)]

class Page(HTMLParser):
    "The ids of a page, what it refers to, and Markdown of links in its prose"
    def __init__(self, text):
        super().__init__()
        self.ids,self.refs,self.raw,self.inside = set(),[],[],[]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in as_it_is: self.inside.append(tag)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k) and (k == 'id' or tag == 'a')}
        self.refs += css_refs(attrs.get('style') or '')
        for k in url_attrs:
            if attrs.get(k) is None or tag == 'meta': continue
            urls = [o.split()[0] for o in attrs[k].split(',') if o.strip()] if k == 'srcset' else [attrs[k]]
            self.refs += [Ref(url.strip(), tag not in followed) for url in urls]

    def handle_endtag(self, tag):
        if self.inside[-1:] == [tag]: self.inside.pop()

    def handle_data(self, data):
        if not self.inside: self.raw += re.findall(r'\]\([^)\s]*\)', data)
        if 'style' in self.inside: self.refs += css_refs(data)
        if 'script' in self.inside: self.refs += [Ref(url, True) for url in in_script.findall(data)]

def outside(url):
    "What is wrong with the address of another site, or None"
    u = urlsplit(url)
    if u.scheme == 'mailto': return None if '@' in u.path else 'no address'
    if u.scheme not in ('http', 'https'): return f'unknown scheme {u.scheme!r}'
    if not re.fullmatch(r'([a-z0-9-]+\.)+[a-z]{2,}(:\d+)?', u.netloc.lower()): return f'no host {u.netloc!r}'
    if u.netloc.startswith('example.'): return 'a placeholder'
    if re.search(r'[\s<>"{}|\\^`]', url): return 'a character that an address cannot have'

def check(folder):
    "What is wrong with the site in `folder`, a list of lines that name the page and the link"
    folder = Path(folder).resolve()
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in sorted(folder.rglob('*.html'))}
    refs = [(p, ref) for p,page in pages.items() for ref in page.refs]
    refs += [(p, ref) for p in sorted(folder.rglob('*.css')) for ref in css_refs(p.read_text(encoding='utf-8'))]
    index = folder/'search.json'
    if index.exists(): refs += [(index, Ref(o['href'], False)) for o in json.loads(index.read_text(encoding='utf-8'))]
    wrong,linked = [],{folder/'index.html', folder/'404.html'}

    def bad(page, ref, why): wrong.append(f'{page.relative_to(folder)}: {ref.url}: {why}')

    for page,ref in refs:
        u = urlsplit(ref.url)
        if u.scheme == 'data': continue
        if u.scheme or u.netloc:
            if ref.loaded: bad(page, ref, 'loaded from another site')
            elif why := outside(ref.url): bad(page, ref, why)
            continue
        if u.path.startswith('/'):
            bad(page, ref, 'from the root of the server, where the site need not be')
            continue
        to = (page.parent/unquote(u.path)).resolve() if u.path else page
        if to.is_dir(): to = to/'index.html'
        if not to.is_relative_to(folder): bad(page, ref, 'outside the site')
        elif not to.is_file(): bad(page, ref, 'there is no such file')
        elif u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids | {'top'}: bad(page, ref, 'there is no such anchor')
        if to != page and page in pages: linked.add(to)
    wrong += [f'{p.relative_to(folder)}: {o}: a link that is shown as it is written' for p,page in pages.items() for o in page.raw]
    wrong += [f'{p.relative_to(folder)}: no page links to it' for p in pages if p not in linked]
    return list(dict.fromkeys(wrong))

def main(argv):
    folder = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent/'_docs'
    if not (folder/'index.html').exists(): return f'{folder} holds no site'
    return '\n'.join(check(folder)) or None

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
