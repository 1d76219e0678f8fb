"Tables and sentences of calibration.py, made of its rows: `python benchmarks/calibration_table.py` writes calibration.md anew from calibration.json."
import collections, json, statistics
from pathlib import Path

MEASURES = dict(accuracy=('accuracy', 1), nll=('NLL', 3), t_nll=('NLL T', 3), ece=('ECE', 3), t_ece=('ECE T', 3), aurc=('AURC', 1),
                plain_aurc=('AURC T', 1), form_nll=('NLL form', 3), form_aurc=('AURC form', 1), half=('surest half', 2), gap=('confidence - accuracy', 3))
SCORES = dict(accuracy=('accuracy', 2, ' points'), t_nll=('NLL after a temperature', 3, ''), aurc=('AURC', 1, ''))
JUDGED = SCORES | dict(plain_aurc=('AURC after a temperature', 1, ''))
PAIRS = [(a, 'hard') for a in ('uniform .1', 'uniform .4', 'online .5', 'online .7', 'online .9')]
PAIRS += [(a, 'uniform .1') for a in ('online .5', 'online .7', 'online .9')] + [('online .5', 'uniform .4'), ('online .7', 'uniform .4')]
MONITORS = dict(valid_loss='valid_loss', valid_t_nll='NLL after a temperature', valid_error='error', last='the last epoch')
CHOICES = dict(valid_t_nll='by validation NLL after a temperature', valid_error='by validation error')


def short(x, digits):
    "A number without the zero before its point."
    res = f'{x:.{digits}f}'
    if float(res) == 0: res = res.lstrip('-')
    return res.replace('0.', '.', 1) if abs(float(res)) < 1 and digits else res


def table(head, body): return '\n'.join(f'| {" | ".join(o)} |' for o in (head, ['---'] * len(head), *body)) + '\n'


def plain(x): return f'{x:.3g}'.replace('0.', '.', 1)


def sign_of(measure): return 1 if measure == 'accuracy' else -1


def mean_error(xs):
    "Mean, and 1.96 standard errors (None of one)"
    xs = list(xs)
    return statistics.mean(xs), 1.96 * statistics.stdev(xs) / len(xs)**.5 if len(xs) > 1 else None


def shown(found, digits, sign=False):
    mean, error = found
    plus = '+' if sign and float(f'{mean:.{digits}f}') > 0 else ''
    return plus + short(mean, digits) + ('' if error is None else f' ± {short(error, digits)}')


def title(case): return f'{case[0]}, {f"{plain(case[1])} wrong" if case[1] else "clean"}, {case[2]}'


def cases(rows):
    "{(data, noise, model): {method: {seed: row}}} of seeds that have all methods"
    res = {}
    for o in rows:
        if not o['long']: res.setdefault((o['data'], o['noise'], o['model']), {}).setdefault(o['method'], {})[o['seed']] = o
    names = max(res.values(), key=len)
    for case, of in list(res.items()):
        seeds = set.intersection(*(set(of.get(m, ())) for m in names))
        res[case] = {m: {s: of[m][s] for s in sorted(seeds)} for m in names} if seeds else None
    return {k: v for k, v in res.items() if v}


def difference(of, a, b, measure): return mean_error(row[measure] - of[b][seed][measure] for seed, row in of[a].items())


def method_table(rows):
    body = []
    for case, of in cases(rows).items():
        for m, seeds in of.items():
            values = [shown(mean_error(o[k] for o in seeds.values()), d) for k, (_, d) in MEASURES.items()]
            body.append([title(case) if m == 'hard' else '', m, *values])
    return table(['data, labels, model', 'method', *[o[0] for o in MEASURES.values()]], body)


def difference_table(rows, measure):
    "Of each pair of methods, with a * where it is beyond its interval"
    def cell(found, digits): return shown(found, digits, True) + (' *' if found[1] is not None and abs(found[0]) > found[1] else '')
    digits = JUDGED[measure][1]
    body = [[title(c), *[cell(difference(of, a, b, measure), digits) for a, b in PAIRS]] for c, of in cases(rows).items()]
    return table(['', *[f'{a} - {b}' for a, b in PAIRS]], body)


def judged(by, a, b, measure):
    "Where method `a` is better than `b`, worse, or the interval holds 0: {case: (mean, error)} of each. One seed has no interval"
    res = [{}, {}, {}]
    for case, of in by.items():
        mean, error = found = difference(of, a, b, measure)
        res[2 if abs(mean) <= (error or 0) else 0 if mean * sign_of(measure) > 0 else 1][case] = found
    return res


def against(by, a, b):
    "A sentence: `a` beside `b`"
    parts = []
    for m, (name, digits, _) in JUDGED.items():
        better, worse, _ = judged(by, a, b, m)
        where = '; '.join(f'{title(c)} {shown(o, digits, True)}' for c, o in worse.items())
        parts.append(f'{name} in {len(better)}, worse in {len(worse) or "none"}' + (f' ({where})' if where else ''))
    return f'**{a} beside {b}**, of {len(by)} cases better in ' + ', '.join(parts) + '.'


def group_of(case): return f'{"digits" if case[0] == "digits" else "Fashion"}, {"wrong labels" if case[1] else "clean"}'


def group_differences(by, measure, a, b):
    "By data set, clean or with wrong labels, the mean of a - b over its cases, and 1.96 standard errors over the seeds that all cases have"
    groups = {}
    for c, of in by.items(): groups.setdefault(group_of(c), []).append(of)
    return {g: mean_error(statistics.mean(of[a][s][measure] - of[b][s][measure] for of in some) for s in complete(by)) for g, some in groups.items()}


def group_table(by, measure):
    "Mean differences of pairs of methods by data set, clean or with wrong labels; 40 classes are with Fashion. ± over the seeds that all cases have"
    sizes = collections.Counter(map(group_of, by))
    head = ['', *[f'{g} ({n} cases)' for g, n in sizes.items()]]
    def cell(found): return shown(found, JUDGED[measure][1], True)
    return table(head, [[f'{a} - {b}', *map(cell, group_differences(by, measure, a, b).values())] for a, b in PAIRS])


def mean_of(by, method, measure, when): return statistics.mean(o[measure] for c, of in by.items() if when(c) for o in of[method].values())


def form_sentence(by):
    "What `fit_temperature` gains by choosing between a plain and a normalised temperature"
    parts = []
    for m in next(iter(by.values())):
        rows = [o for of in by.values() for o in of[m].values()]
        share = statistics.mean(o['normalized'] / 2 for o in rows)
        nll, area = (statistics.mean(o['form_' + k] - o['plain_' + k] for o in rows) for k in ('nll', 'aurc'))
        parts.append(f'{m} {share:.0%} of the fits, NLL {short(nll, 3)}, AURC {short(area, 1)}')
    return ('**Form of temperature**: how often a normalised temperature was chosen, and what choosing changed on the average, beside always a plain '
            'one: ' + '; '.join(parts) + '.')


def raw_sentence(by):
    def of(measure, when): return ', '.join(f'{m} {short(mean_of(by, m, measure, when), 3)}' for m in next(iter(by.values())))
    kinds = dict(clean=lambda c: not c[1]) | {'wrong labels': lambda c: c[1]}
    parts = [f'{name}: NLL {of("nll", when)}; ECE {of("ece", when)}' for name, when in kinds.items() if any(map(when, by))]
    return '**As trained, no temperature**, means of the cases. ' + '. '.join(parts) + '.'


def picked(row, monitor):
    "Index of the epoch that the monitor picks"
    scores = [o[monitor] for o in row['epochs']] if monitor != 'last' else [0] * len(row['epochs'])
    return scores.index(min(scores)) if monitor != 'last' else len(scores) - 1


def epoch_regret(row, monitor, measure):
    scores, sign = [o[measure] for o in row['epochs']], sign_of(measure)
    return max(sign * o for o in scores) - sign * scores[picked(row, monitor)]


def by_seed(rows, f):
    "Mean of `f` over the rows of each seed, then mean and error over seeds"
    seeds = {}
    for o in rows: seeds.setdefault(o['seed'], []).append(f(o))
    return mean_error(map(statistics.mean, seeds.values()))


def monitor_groups(rows):
    long, res = [o for o in rows if o['long']], {}
    for o in long: res.setdefault(f'{title((o["data"], o["noise"], o["model"]))}, {o["method"]}', []).append(o)
    return long, res


def monitor_table(rows, measure):
    long, groups = monitor_groups(rows)
    digits = SCORES[measure][1]
    def line(name, rows): return [name, *[shown(by_seed(rows, lambda o: epoch_regret(o, m, measure)), digits) for m in MONITORS]]
    return table(['', *MONITORS.values()], [line(k, o) for k, o in groups.items()] + [line('**mean**', long)])


def epoch_table(rows):
    long, groups = monitor_groups(rows)
    def line(name, rows): return [name, *[short(statistics.mean(picked(o, m) + 1 for o in rows), 1) for m in MONITORS]]
    return table(['', *MONITORS.values()], [line(k, o) for k, o in groups.items()])


def monitor_sentence(rows):
    long, _ = monitor_groups(rows)
    if not long: return '**Which epoch**: not measured.'
    parts = []
    for measure, (name, digits, unit) in SCORES.items():
        of = ', '.join(f'{label} {shown(by_seed(long, lambda o: epoch_regret(o, m, measure)), digits)}' for m, label in MONITORS.items())
        gain = by_seed(long, lambda o: epoch_regret(o, 'valid_loss', measure) - epoch_regret(o, 'valid_t_nll', measure))
        parts.append(f'{name}{unit}: {of}; NLL after a temperature picks an epoch that is better than that of valid_loss by {shown(gain, digits)}')
    return f'**Which epoch**, regret, {len({o["seed"] for o in long})} seed(s): ' + '. '.join(parts) + '.'


def complete(by):
    "Seeds that every case has"
    return sorted(set.intersection(*(set(of['hard']) for of in by.values())))


def chosen(of, seed, rule): return rule if rule in of else min(of, key=lambda m: of[m][seed][rule])


def choice_regret(by, rule, measure):
    "Of each seed the mean over cases of what `rule` loses against the method that is best in this case on the average"
    sign = sign_of(measure)
    best = {c: max(of, key=lambda m: sign * statistics.mean(o[measure] for o in of[m].values())) for c, of in by.items()}
    return [statistics.mean(sign * (of[best[c]][s][measure] - of[chosen(of, s, rule)][s][measure]) for c, of in by.items()) for s in complete(by)]


def choice_table(by):
    rules = {m: f'always {m}' for m in next(iter(by.values()))} | CHOICES
    groups = {name: part for name in ('digits', 'Fashion') if (part := {c: o for c, o in by.items() if (c[0] == 'digits') == (name == 'digits')})}
    groups['all'] = by
    body = [[label, *[shown(mean_error(choice_regret(part, rule, m)), d) for m, (_, d, _) in SCORES.items() for part in groups.values()]]
            for rule, label in rules.items()]
    return table(['', *[f'{label}, {g}' for label in ('accuracy', 'NLL T', 'AURC') for g in groups]], body)


def picks_table(by):
    "Which method each rule chose, how many times; and which one is best by hindsight"
    def counts(of, rule):
        names = [chosen(of, s, rule) for s in complete(by)]
        return ', '.join(f'{names.count(m)} {m}' for m in of if m in names)
    def best(of, measure): return max(of, key=lambda m: sign_of(measure) * statistics.mean(o[measure] for o in of[m].values()))
    body = [[title(c), *[best(of, m) for m in SCORES], *[counts(of, rule) for rule in CHOICES]] for c, of in by.items()]
    return table(['', 'best by accuracy', 'best by NLL T', 'best by AURC', *CHOICES.values()], body)


def choice_sentence(by):
    parts, rule = [], 'valid_t_nll'
    for measure, (name, digits, unit) in list(SCORES.items())[:2]:
        lost = choice_regret(by, rule, measure)
        gains = [f'always {o} by {shown(mean_error(b - a for a, b in zip(lost, choice_regret(by, o, measure))), digits)}'
                 for o in ('uniform .1', 'uniform .4', 'online .5', 'online .7', 'online .9')]
        parts.append(f'{name}: it loses {shown(mean_error(lost), digits)}{unit} against the best in hindsight, and is better than {", ".join(gains)}')
    return '**The method that has the least validation NLL after a temperature**, mean of all cases. ' + '. '.join(parts) + '.'


def markdown(out):
    "The tables, of what there is so far"
    rows, m = out['rows'], out['machine']
    by = cases(rows)
    counts = sorted({len(of['hard']) for of in by.values()})
    parts = ['# What smoothing does to accuracy, probabilities and ranking', '',
             f'Made by `{out["command"]}` on {m["date"]}: {m["cpu"]}, {m["threads"]} thread(s), Python {m["python"]}, torch {m["torch"]}, fastai '
             f'{m["fastai"]}; {len(rows)} trainings that took {sum(o["seconds"] for o in rows) / 60:.0f} minutes, {" to ".join(map(str, counts))} '
             'seed(s). How it is measured: the docstring of calibration.py. What `eps_find` is worth: eps_find.md.',
             *[f'Left out: {o}.' for o in out['skipped']], '',
             '## What is seen', '', *[f'- {o}' for o in [*[against(by, a, b) for a, b in PAIRS], raw_sentence(by), form_sentence(by),
                                                        monitor_sentence(rows), choice_sentence(by)]], '',
             *[o for k, (name, _, _) in JUDGED.items() for o in (f'## Differences in {name}, means of cases', '', group_table(by, k))],
             '## All methods', '', method_table(rows)]
    for k, (name, _, _) in JUDGED.items(): parts += [f'## Differences in {name}, each case (* beyond the interval)', '', difference_table(rows, k)]
    if any(o['long'] for o in rows):
        for k, (name, _, _) in SCORES.items(): parts += [f'## Which epoch: regret in {name}', '', monitor_table(rows, k)]
        parts += ['## Which epoch: the number of the one that is picked, mean', '', epoch_table(rows)]
    parts += ['## Which method: regret', '', choice_table(by), '## Which method: what is best, and what was chosen', '', picks_table(by)]
    return '\n'.join(parts)


if __name__ == '__main__':
    here = Path(__file__).with_name('calibration.json')
    here.with_suffix('.md').write_text(markdown(json.loads(here.read_text())))
