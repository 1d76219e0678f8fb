"Tables and sentences of labels.py, made of its rows: `python benchmarks/labels_table.py` writes labels.md anew from labels.json."
import json, statistics
from pathlib import Path

from calibration_table import mean_error, short, shown, table

# Name, digits, and whether more is better (None: neither) of what the tables show
MEASURES = dict(mAP=('mAP', 1, True), accuracy=('accuracy', 1, True), f1=('F1', 1, True), best_f1=('best F1', 1, True),
                nll=('NLL', 3, False), t_nll=('NLL T', 3, False), ab_nll=('NLL a, b', 3, False), ece=('ECE', 3, False),
                t_ece=('ECE T', 3, False), aurc=('AURC', 1, False), ab_aurc=('AURC a, b', 1, False), predicted=('predicted', 3, None),
                rare=('rare', 3, None))
SHOWN = 'mAP', 'accuracy', 'f1', 'best_f1', 'nll', 't_nll', 'ab_nll', 'ece', 'aurc', 'rare' # in the table of a case
JUDGED = 'mAP', 'f1', 'best_f1', 'nll', 't_nll', 'ab_nll', 'aurc', 'ab_aurc'
GROUPS = {'clean': lambda c: c[1] == 'clean', 'missing positives': lambda c: 'missing' in c[1] or 'positive' in c[1],
          'flipped': lambda c: 'flipped' in c[1], 'all labels': lambda c: True}
PROBS, DECISIONS = ('nll', 't_nll', 'ab_nll', 'ab_aurc'), ('mAP', 'f1', 'best_f1')
COMPARED = [('symmetric .1', 'symmetric .05', 'all labels', ('mAP', *PROBS)), # two methods, labels, measures
            ('symmetric .1', 'hard', 'all labels', ('mAP', *PROBS)),
            ('prior .1', 'symmetric .1', 'all labels', (*DECISIONS, *PROBS)),
            ('(.1, 0)', 'hard', 'clean', ('mAP', *PROBS, 'predicted')),
            ('(.1, 0)', 'hard', 'missing positives', (*DECISIONS, 'ab_nll')),
            ('(.1, 0)', 'symmetric .1', 'missing positives', (*DECISIONS, 'ab_nll')),
            ('(.2, 0)', 'hard', 'flipped', (*DECISIONS, *PROBS)),
            ('online .25', 'hard', 'all labels', (*DECISIONS, *PROBS)),
            ('online .4', 'online .25', 'all labels', (*DECISIONS, *PROBS))]


def cases(rows):
    "{(data, labels): {method: {seed: row}}} of seeds that have all methods"
    res = {}
    for o in rows: res.setdefault((o['data'], o['labels']), {}).setdefault(o['method'], {})[o['seed']] = o
    names = list(max(res.values(), key=len))
    for case, of in res.items():
        seeds = sorted(set.intersection(*(set(of.get(m, ())) for m in names)))
        res[case] = {m: {s: of[m][s] for s in seeds} for m in names} if seeds else None
    return {k: v for k, v in res.items() if v}


def change(by, method, measure, base='hard'):
    "Of `method` from `base`: mean over the cases of `by` of each seed that all of them have, then mean and 1.96 standard errors over seeds"
    seeds = set.intersection(*(set(of[base]) for of in by.values()))
    return mean_error(statistics.mean(of[method][s][measure] - of[base][s][measure] for of in by.values()) for s in sorted(seeds))


def mean_of(by, method, measure): return statistics.mean(o[measure] for of in by.values() for o in of[method].values())


def clear(found): return found[1] is not None and abs(found[0]) > found[1]


def cell(by, method, measure, base='hard'):
    found = change(by, method, measure, base)
    return shown(found, MEASURES[measure][1], True) + (' *' if clear(found) else '')


def method_table(by):
    "Hard labels as they are, the others by their change from them; and what was there to predict"
    def line(m): return [m, *[short(mean_of(by, m, k), MEASURES[k][1]) if m == 'hard' else cell(by, m, k) for k in SHOWN]]
    body = [line(m) for m in next(iter(by.values()))]
    share, rare = (short(mean_of(by, 'hard', o), 3) for o in ('share', 'rare_share'))
    return f'Share of positives {share}, of those of the rare labels {rare}.\n\n' + table(['', *[MEASURES[k][0] for k in SHOWN]], body)


def clear_table(by):
    "In how many cases a method is clearly better than hard labels, and in how many clearly worse"
    def count(m, k):
        found = [o[0] * (1 if MEASURES[k][2] else -1) for c, of in by.items() if clear(o := change({c: of}, m, k))]
        return f'{sum(o > 0 for o in found)} / {sum(o < 0 for o in found)}'
    body = [[m, *[count(m, k) for k in JUDGED]] for m in next(iter(by.values())) if m != 'hard']
    return table(['better / worse', *[MEASURES[k][0] for k in JUDGED]], body)


def best(of, measure):
    "The method with the best mean, with a * where it is clearly better than hard labels"
    sign = 1 if MEASURES[measure][2] else -1
    m = max(of, key=lambda m: sign * statistics.mean(o[measure] for o in of[m].values()))
    return m + (' *' if m != 'hard' and clear(change({0: of}, m, measure)) else '')


def best_table(by):
    body = [[', '.join(c), *[best(of, k) for k in JUDGED]] for c, of in by.items()]
    return table(['best by', *[MEASURES[k][0] for k in JUDGED]], body)


def compared(by, a, b, group, measures):
    "A sentence: method `a` beside `b`, mean change in each data set"
    data = {}
    for c, of in by.items():
        if GROUPS[group](c): data.setdefault(c[0], {})[c] = of
    parts = [f'{name} ' + ', '.join(f'{MEASURES[k][0]} {cell(some, a, k, b)}' for k in measures) for name, some in data.items()]
    return f'**{a} beside {b}, {group}**: ' + '; '.join(parts) + '.'


def rare_sentence(by):
    "Mean probability, divided by the share that is there"
    clean = [of for c, of in by.items() if GROUPS['clean'](c)]
    def ratio(m): return statistics.mean(mean_of({0: of}, m, 'rare') / mean_of({0: of}, m, 'rare_share') for of in clean)
    return ('**Rare labels, clean**: mean probability over the share of test rows that have them, mean of the data sets: '
            + ', '.join(f'{m} {short(ratio(m), 2)}' for m in next(iter(by.values()))) + '.')


def markdown(out):
    "The tables, of what there is so far"
    rows, m = out['rows'], out['machine']
    by = cases(rows)
    methods = {*next(iter(by.values()))}
    counts = sorted({len(of['hard']) for of in by.values()})
    parts = ['# What smoothing of several labels does to ranking and probabilities', '',
             f'Made by `{out["command"]}` on {m["date"]}: {m["cpu"]}, {m["threads"]} thread(s), Python {m["python"]}, torch {m["torch"]}, '
             f'fastai {m["fastai"]}; {len(rows)} trainings that took {sum(o["seconds"] for o in rows) / 60:.0f} minutes, '
             f'{" to ".join(map(str, counts))} seed(s). How it is measured: the docstring of labels.py. Hard labels are shown as they are, '
             'other methods by their change from them, ± 1.96 standard errors, with a * where the change is beyond that.',
             *[f'Left out: {o}.' for o in out['skipped']], '']
    for c, of in by.items(): parts += [f'## {c[0]}, {c[1]}', '', method_table({c: of})]
    for data in dict.fromkeys(c[0] for c in by):
        some = {c: of for c, of in by.items() if c[0] == data}
        if len(some) > 1: parts += [f'## {data}, mean of {len(some)} cases', '', method_table(some)]
    parts += [f'## In how many of {len(by)} cases a method is clearly better than hard labels, and worse', '', clear_table(by),
              '## Which method is best', '', best_table(by), '## What is seen', '',
              *[f'- {compared(by, *o)}' for o in COMPARED if {*o[:2]} <= methods and any(map(GROUPS[o[2]], by))],
              f'- {rare_sentence(by)}', '']
    return '\n'.join(parts)


if __name__ == '__main__':
    here = Path(__file__).with_name('labels.json')
    here.with_suffix('.md').write_text(markdown(json.loads(here.read_text())))
