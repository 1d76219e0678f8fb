"""How good the eps that `Learner.eps_find` picks is, on real images.

    OMP_NUM_THREADS=1 python benchmarks/eps_find.py --fashion DIR [--seeds 3] [--epochs 40] [--quick]

DIR holds FashionMNIST/raw, as torchvision keeps it: a download, or the four files of the Debian package dataset-fashion-mnist. Without it, digits
alone are measured. It writes eps_find.json and eps_find.md beside this script, after each data set, noise and seed, so that a run which is
stopped leaves what it has got. `--quick` tries one seed, few epochs and one noise, prints the tables and writes nothing: it shows that the script runs,
no more.

Data: scikit-learn's digits (1000 images to train on, 300 to validate, 497 to test) and FashionMNIST (3000, 1000, 10000), drawn anew by each seed. In the
training and validation parts a share of the labels is replaced by another class at random: validation labels are as noisy as those trained on, as they
are for users. The test part is clean.
Model: an MLP 256-256 on the pixels, trained by fit_one_cycle with fastai's own lr, 1e-3. Runs with one seed share split, noise, first weights and order
of batches, and differ in eps alone.

Measures are of the test part: accuracy, NLL, Brier score, ECE of 15 bins, and NLL and ECE after a temperature (T-NLL, T-ECE). This temperature is
cross-fitted on the test rows themselves (each fifth gets that of the others): it says what a temperature can do, not spoilt by noise in validation
labels, which teaches T the noise too. `valid_temperature` in the JSON is what `fit_temperature` finds with the noisy labels.

Choices of eps that are compared: always 0, always .1, always .4 (the largest of the grid), `eps_find()`, which is K/(K-1) times the validation error of
one short pilot, and `eps_find(full=True)`, which compares pilots. Both see noisy labels only. Regret is what a choice loses on the test part against the
best eps of the grid, the one whose mean over seeds is best; that of accuracy in points. The eps of one pilot lies between those of the grid, so it gets a
training of its own. The best of the grid is known by hindsight; a regret below 0 is of a choice between its values, or one that goes with the seed."""
import argparse, json, shlex, statistics, time, warnings
from pathlib import Path

from calibration import TensorLoader, mlp, parts, sources
from calibration_table import plain, short, sign_of, table
from fastai.basics import *
from fastai.callback.schedule import *
from fastai_smooth.all import *
from fastai_smooth.predictions import raw_preds
from fastai_smooth.scaling import cross_fitted
from machine import machine

GRID, NOISES, LR, K = [0., .05, .1, .2, .4], [0., .2, .4], 1e-3, 10
SIZES = dict(digits=(1000, 300), Fashion=(3000, 1000))   # to train on, to validate
FIXED = dict(zero=0., tenth=.1, largest=.4)
RULES = dict(zero='eps=0', tenth='eps=.1', largest='eps=.4', closed='eps_find()', full='eps_find(full=True)')
ALLOWED = dict(accuracy=.3, t_nll=.02)                   # mean regret: points of accuracy, nats


def get_learner(data):
    "An MLP with its first weights; `data` as `parts` gives them."
    dls = DataLoaders(*[TensorLoader(o, bs=64 if i == 0 else 2000, shuffle=i == 0) for i, o in enumerate(data)])
    return Learner(dls, mlp(data[0][0][0].shape[-1], K), CrossEntropyLossFlat(), lr=LR)


def measured(logits, targs):
    "All measures of test rows, before and after a temperature."
    res, scaled = dict(temperature=best_temperature(logits, targs)), cross_fitted(logits.double(), targs)
    for prefix, z in (('', logits.double()), ('t_', scaled)):
        probs = z.softmax(1)
        res |= {prefix + k: f(probs, targs).item() for k, f in (('nll', nll), ('ece', calibration_error), ('brier', brier_score))}
    floor = if_calibrated(calibration_error, scaled.softmax(1), targs, n_draws=200)
    return dict(accuracy=100 * (logits.argmax(1) == targs).double().mean().item(), t_ece_floor=floor[0].item(), t_ece_floor_95=floor[1].item(), **res)


def one_run(data, eps, seed, epochs):
    "Train one model, and measure it."
    start = time.time()
    with no_random(seed):
        learn = get_learner(data).to_smooth(eps)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs)
            test = raw_preds(learn, 2)
            temperature = learn.fit_temperature(normalize=False).temperature # a number
    return dict(eps=eps, **measured(test.logits, test.targs), valid_temperature=temperature, seconds=round(time.time() - start, 2))


def found(data, seed, epochs, full):
    "What `eps_find` says of this Learner, as a dict."
    start = time.time()
    with no_random(seed): learn = get_learner(data)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        res = learn.eps_find(n_epoch=epochs, full=full, show_plot=False)
    scores = None if res.scores is None else res.scores.to_dict('records')
    return res._asdict() | dict(scores=scores, warned=[str(o.message) for o in said], seconds=round(time.time() - start, 2))


def one_case(data, name, noise, seed, epochs):
    "All that one data set, noise and seed is asked: the grid, both ways of `eps_find`, and a run with the eps of one pilot."
    data = parts(data, SIZES[name], noise, seed)
    closed, full = (found(data, seed, epochs, o) for o in (False, True))
    runs = [one_run(data, eps, seed, epochs) for eps in sorted({*GRID, closed['eps']})]
    return dict(data=name, noise=noise, seed=seed, n=[len(o) for o in data], closed=closed, full=full, runs=runs)


def cases(rows):
    "Rows of each data set and noise, one a seed."
    res = {}
    for o in rows: res.setdefault((o['data'], o['noise']), []).append(o)
    return res


def value(row, eps, measure): return next(o[measure] for o in row['runs'] if o['eps'] == eps)


def mean(rows, eps, measure): return statistics.mean(value(o, eps, measure) for o in rows)


def chosen(row, rule): return FIXED[rule] if rule in FIXED else row[rule]['eps']


def best_of(rows, measure): return max(GRID, key=lambda eps: sign_of(measure) * mean(rows, eps, measure))


def regret(rows, rule, measure):
    "Mean over seeds of what `rule` loses against the best of the grid, and its standard error (None of one seed)."
    sign, best = sign_of(measure), best_of(rows, measure)
    lost = [sign * (value(o, best, measure) - value(o, chosen(o, rule), measure)) for o in rows]
    return statistics.mean(lost), statistics.stdev(lost) / len(lost)**.5 if len(lost) > 1 else None


def mean_regrets(rows):
    "{measure: {rule: (mean over cases, its standard error)}}"
    res = {}
    for m in ALLOWED:
        for rule in RULES:
            of = [regret(o, rule, m) for o in cases(rows).values()]
            error = None if any(o[1] is None for o in of) else sum(o[1]**2 for o in of)**.5 / len(of)
            res.setdefault(m, {})[rule] = statistics.mean(o[0] for o in of), error
    return res


def with_error(found, digits): return short(found[0], digits) + ('' if found[1] is None else f' ± {short(found[1], digits)}')


def title(case): return f'{case[0]} {plain(case[1])}'


def grid_table(rows, measures):
    "One row a case, one column an eps; `measures` with their number of decimals."
    def cell(seeds, eps): return '/'.join(short(mean(seeds, eps, m), d) for m, d in measures.items())
    return table(['data, label noise', *map(plain, GRID)], [[title(c), *[cell(o, eps) for eps in GRID]] for c, o in cases(rows).items()])


def regret_table(rows, measure, digits):
    body = [[title(c), *[with_error(regret(o, r, measure), digits) for r in RULES]] for c, o in cases(rows).items()]
    return table(['data, label noise', *RULES.values()], body + [['**mean**', *[with_error(o, digits) for o in mean_regrets(rows)[measure].values()]]])


def best_table(rows):
    "Which eps is best by hindsight, and which ones were chosen, one a seed"
    body = []
    for c, seeds in cases(rows).items():
        best = [plain(best_of(seeds, m)) for m in ALLOWED]
        picks = [', '.join(plain(o[rule]['eps']) for o in seeds) for rule in ('closed', 'full')]
        evidence = sum(not o['full']['verdict'].startswith('no evidence') for o in seeds)
        body.append([title(c), *best, *picks, f'{evidence} of {len(seeds)}'])
    return table(['data, label noise', 'best by accuracy', 'best by T-NLL', RULES['closed'], RULES['full'], 'of these, with evidence'], body)


def noise_table(rows):
    body = []
    for c, seeds in cases(rows).items():
        truth, of = c[1] * K / (K - 1), [o['closed'] for o in seeds]
        estimates = '; '.join(f'{short(o["noise"], 3)} ({short(o["noise_interval"][0], 3)} to {short(o["noise_interval"][1], 3)})' for o in of)
        covered = sum(o['noise_interval'][0] <= truth <= o['noise_interval'][1] for o in of)
        body.append([title(c), short(truth, 3), estimates, f'{covered} of {len(of)}', ', '.join(short(o['valid_error'], 3) for o in of)])
    return table(['data, label noise', 'random labels', 'estimate (95% interval), one a seed', 'in the interval', "pilot's validation error"], body)


def holds(ok): return '**holds**' if ok else '**does not hold**'


def seen(rows):
    "What the issue expects, and whether it holds, in the numbers of `rows`"
    by, lines = cases(rows), []
    gains = [max(mean(o, eps, 'accuracy') for eps in GRID[1:]) - mean(o, 0., 'accuracy') for o in by.values()]
    tenth = [mean(o, .1, 'accuracy') - mean(o, 0., 'accuracy') for o in by.values()]
    lines.append(f'Smoothing raises accuracy, {holds(min(gains) > 0)}: the best eps above 0 beats eps=0 in {sum(g > 0 for g in gains)} of {len(by)} cases, by '
                 f'{statistics.mean(gains):.1f} points on the average, and eps=.1 in {sum(g > 0 for g in tenth)}, by {statistics.mean(tenth):.1f}.')
    if clean := by.get(('digits', 0.)):
        raw, scaled, floor = ([mean(clean, eps, m) for eps in GRID] for m in ('ece', 't_ece', 't_ece_floor_95'))
        lines.append(f'On clean digits smoothing makes ECE worse, {holds(raw == sorted(raw))}: it rises with eps, {" ".join(short(o, 3) for o in raw)}.')
        lines.append(f'A temperature mends that, {holds(all(t < f for t, f in zip(scaled, floor)))}: T-ECE is {" ".join(short(o, 3) for o in scaled)}; '
                     f'of models that are calibrated perfectly, 95% would show up to {" ".join(short(o, 3) for o in floor)}.')
    worse = [(title(c), *(short(mean(o, eps, 't_nll'), 3) for eps in (0., .1))) for c, o in by.items() if mean(o, .1, 't_nll') > mean(o, 0., 't_nll')]
    lines.append(f'After a temperature, NLL is larger with eps=.1 than with 0 in {len(worse)} of {len(by)} cases'
                 + ''.join(f'; {c}: {a} to {b}' for c, a, b in worse) + '.')
    for m, digits, unit in (('accuracy', 2, ' points'), ('t_nll', 4, '')):
        means = mean_regrets(rows)[m]
        lines.append(f'Mean regret of {"T-NLL" if m == "t_nll" else m} at most {short(ALLOWED[m], digits)}{unit}: '
                     + ', '.join(f'{RULES[r]} {with_error(means[r], digits)} {holds(means[r][0] <= ALLOWED[m])}' for r in ('closed', 'full'))
                     + ', beside ' + ', '.join(f'{RULES[r]} {short(means[r][0], digits)}' for r in FIXED) + '.')
    return '\n'.join(f'- {o}' for o in lines) + '\n'


def markdown(out):
    "The tables, of what there is so far"
    rows, m = out['rows'], out['machine']
    seeds = max(map(len, cases(rows).values()))
    return '\n'.join([
        '# What eps_find is worth', '',
        f'Made by `{out["command"]}` in {out["seconds"] / 60:.0f} minutes on {m["date"]}: {m["cpu"]}, {m["threads"]} thread(s), Python {m["python"]}, '
        f'torch {m["torch"]}, fastai {m["fastai"]}. MLP 256-256, one-cycle, {out["epochs"]} epochs, lr {LR:g}; means over {seeds} seed(s). How it is '
        'measured: the docstring of eps_find.py.',
        *[f'Left out: {o}.' for o in out['skipped']], '',
        '## What is seen', '', seen(rows),
        '## Accuracy % / NLL / ECE15 by eps', '', grid_table(rows, dict(accuracy=1, nll=2, ece=3)),
        '## The same after a temperature: T-NLL / T-ECE15 by eps', '', grid_table(rows, dict(t_nll=3, t_ece=3)),
        '## Regret, accuracy in points (± one standard error over seeds)', '', regret_table(rows, 'accuracy', 2),
        '## Regret, T-NLL', '', regret_table(rows, 't_nll', 3),
        '## The best eps by hindsight, and what was chosen', '', best_table(rows),
        '## Noise: random labels among the validation labels, and what the pilot says', '', noise_table(rows)])


def save(out):
    here = Path(__file__)
    here.with_suffix('.json').write_text(json.dumps(out, indent=1) + '\n')
    here.with_suffix('.md').write_text(markdown(out))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--fashion', required=True, help='folder that holds FashionMNIST/raw')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--quick', action='store_true', help='one seed, 4 epochs, noise .2; writes nothing')
    args, start = p.parse_args(), time.time()
    if args.quick: args.seeds, args.epochs = 1, 4
    data, skipped = sources(args.fashion)
    command = shlex.join(['python', 'benchmarks/eps_find.py', '--fashion', 'DIR', '--seeds', str(args.seeds), '--epochs', str(args.epochs)])
    out = dict(machine=machine('cpu'), command=command, epochs=args.epochs, seconds=0, lr=LR, skipped=skipped, rows=[])
    for seed, name, noise in [(s, d, n) for s in range(args.seeds) for d in data for n in ([.2] if args.quick else NOISES)]:
        out['rows'].append(one_case(data[name], name, noise, seed, args.epochs))
        out['rows'].sort(key=lambda o: (list(data).index(o['data']), o['noise'], o['seed']))
        out['seconds'] = round(time.time() - start)
        print(f'{out["seconds"]} s: {name}, noise {noise:g}, seed {seed}', flush=True)
        if not args.quick: save(out)
    print(markdown(out))


if __name__ == '__main__': main()
