"""Smoothing of several labels, on clean labels, where positives are missing, and where labels are flipped.

    OMP_NUM_THREADS=1 python benchmarks/labels.py --yeast FILE [--logits DIR] [--seeds 5] [--measure] [--quick]

FILE is yeast.csv.gz of PyPI's package river (MULAN's data set, Elisseeff & Weston 2001). Without it, pairs of digits alone are measured.
The logits of each training are kept in the folder of --logits, outside of the repository: what is there is not trained again, so a run
which was stopped goes on when it is started again. At the end labels.json and labels.md are written beside this script; `--measure` trains
nothing and writes them of what there is. `--quick` tries one seed, one epoch and clean labels, prints the tables and writes nothing: it
shows that the script runs, no more.

Data: pairs, `fastai_smooth.labels.pairs`, canvases with two of scikit-learn's digits (600 to train on, 400 to validate, 3000 to test, these
two of other scans than the first); and yeast, 2417 genes with 103 features and 14 labels (1500, 300, 617). Both are drawn anew by each
seed.
Labels of the training and validation parts, the test part is always clean: clean; '.3 missing', each positive is dropped with that
probability; 'one positive', a row keeps one of its positives, drawn at random, which drops half of those of pairs and three quarters of
yeast's; '.1 flipped', each label is wrong with that probability.
Models: a CNN of three convolutions for pairs, an MLP 256-256 for yeast, by `fit_one_cycle`, long enough for the hard model to be
overconfident.
Methods: hard labels; `to_smooth(eps)`, 'symmetric'; `to_smooth(eps, prior='train')`; `to_smooth((e0, e1))`, which makes e0 of a negative
and 1 - e1 of a positive; and `to_smooth(eps, prior='online')`. Runs with one seed share split, wrong labels, first weights and order of
batches.

Measures are of the test part. mAP (mean average precision), ECE (15 bins) and AURC (area under the risk-coverage curve, times 1000) are
macro: the mean of what each label has. NLL, ECE and AURC are raw, after one temperature for all labels (T; it leaves AURC as it is), or
after one scale and shift for all labels (a, b: sigmoid(a x + b)). These are cross-fitted on the test rows themselves, each fifth gets those
of the others: it says what such a step can do, not spoilt by wrong validation labels. Accuracy and F1 (micro) are at a threshold of .5;
best F1 is at the threshold that is best for the other half of the test rows. 'Predicted' is the mean probability, and 'rare' that of the
three rarest of ten labels (four of fourteen).

± is 1.96 standard errors over seeds, of differences from hard labels with the same seed. Of five seeds such an interval holds the truth in
88 of 100 cases, not in 95, and of many comparisons some are beyond it by chance."""
import argparse, json, shlex, tempfile, time, warnings
from collections import namedtuple
from pathlib import Path

import numpy as np, pandas as pd, torch
warnings.filterwarnings('ignore', category=FutureWarning) # of fastai's own use of torch.jit.script
from fastai.basics import *
from fastai.callback.schedule import *
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch.utils.data import TensorDataset

from fastai_smooth.all import *
from fastai_smooth.scaling import cross_fitted, row_nll
from fastai_smooth.labels import pairs
from calibration import TensorLoader, logits_of, rounded, save
from labels_table import markdown
from machine import machine

LABELS = ['clean', '.3 missing', 'one positive', '.1 flipped']
METHODS = {'hard': None, 'symmetric .05': (.05, None), 'symmetric .1': (.1, None), 'prior .1': (.1, 'train'), # eps and prior of `to_smooth`
           '(.1, 0)': ((.1, 0.), None), '(.2, 0)': ((.2, 0.), None), '(0, .1)': ((0., .1), None),
           'online .25': (.25, 'online'), 'online .4': (.4, 'online')}
SIZES = dict(pairs=(600, 400, 3000), yeast=(1500, 300, 617)) # to train on, to validate, to test
EPOCHS, LR = dict(pairs=20, yeast=25), dict(pairs=1e-2, yeast=1e-3)


def digit_pairs(seed):
    "Canvases that are tested on are of the scans that validation has, and training has not."
    train, *others = SIZES['pairs']
    images = pairs(train, sum(others), seed)
    x, y = np.stack([o[..., 0] for o in images.images])[:, None].astype(np.float32) / 255, images.classes.astype(np.float32)
    return [(x[i], y[i]) for i in np.split(np.arange(len(y)), np.cumsum(SIZES['pairs'])[:2])]


def yeast(file, seed):
    df = pd.read_csv(file)
    x, y = (df.filter(regex=o).to_numpy(np.float32) for o in ('^Att', '^Class'))
    idxs = np.random.default_rng([seed, 2]).permutation(len(df))
    return [(x[i], y[i]) for i in np.split(idxs, np.cumsum(SIZES['yeast'])[:2])]


def corrupted(y, labels, rng):
    "0/1 labels `y`, with positives missing or labels flipped"
    if labels == 'clean': return y
    u = rng.random(y.shape)
    if labels == 'one positive': return (y * u == (y * u).max(1, keepdims=True)).astype(np.float32) * y
    share, how = labels.split()
    return np.where(u < float(share), {'missing': 0, 'flipped': 1 - y}[how], y).astype(np.float32)


def parts(arrays, labels, seed):
    "Training, validation and test parts as TensorDatasets, standardised"
    train, rng = arrays[0][0], np.random.default_rng([seed, 1])
    axis = 0 if train.ndim == 2 else None # pixels all alike
    mean, std = train.mean(axis), train.std(axis)
    ys = [corrupted(y, labels if i < 2 else 'clean', rng) for i, (_, y) in enumerate(arrays)]
    return [TensorDataset(torch.tensor((x - mean) / std), torch.tensor(y)) for (x, _), y in zip(arrays, ys)]


def net_for(x, k):
    if x.ndim == 2: return nn.Sequential(nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, k))
    convs = [o for i, n in ((1, 16), (16, 32), (32, 64))
             for o in (nn.Conv2d(i, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.MaxPool2d(2), nn.ReLU())]
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(64 * (x.shape[-2] // 8) * (x.shape[-1] // 8), 128), nn.ReLU(), nn.Linear(128, k))
    return net.to(memory_format=torch.channels_last)


def get_learner(data, name, method):
    "A Learner with its first weights; `data` as `parts` gives them."
    dls = DataLoaders(*[TensorLoader(o, bs=64 if i == 0 else 1000, shuffle=i == 0) for i, o in enumerate(data[:2])])
    x, y = data[0].tensors
    learn = Learner(dls, net_for(x, y.shape[1]), BCEWithLogitsLossFlat(), lr=LR[name])
    if METHODS[method] is None: return learn
    eps, prior = METHODS[method]
    if prior == 'train': prior = y.mean(0) # a TensorDataset can't be asked for its labels alone
    return learn.to_smooth(eps, prior=prior)


Run = namedtuple('Run', 'data labels method seed')


def all_runs(seeds, data, quick=False):
    "Seed by seed, so that a run which is stopped has fewer seeds, not fewer cases"
    return [Run(d, o, m, seed) for seed in range(seeds) for d in data for o in (LABELS[:1] if quick else LABELS) for m in METHODS]


def file_of(folder, run): return folder / f'{"-".join(str(o).replace(" ", "") for o in run)}.npz'


def train(run, data, epochs, path):
    "Train one model, and keep its logits."
    start = time.time()
    with no_random(run.seed):
        learn = get_learner(data, run.data, run.method)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    valid, test = (logits_of(learn.model, o) for o in data[1:])
    part = path.with_name('part') # renamed when it is whole
    with part.open('wb') as f:
        np.savez(f, valid=valid, test=test, valid_targs=data[1].tensors[1], test_targs=data[2].tensors[1], prior=data[0].tensors[1].mean(0),
                 seconds=time.time() - start)
    part.rename(path)


def train_all(runs, arrays_of, folder, quick=False):
    "Train what `folder` has no logits of. `arrays_of` has a function of the seed for each name of data."
    folder.mkdir(parents=True, exist_ok=True)
    last, start = None, time.time()
    for run in runs:
        if (path := file_of(folder, run)).exists(): continue
        if (case := run._replace(method=None)) != last: these, last = parts(arrays_of[run.data](run.seed), run.labels, run.seed), case
        train(run, these, 1 if quick else EPOCHS[run.data], path)
        print(f'{time.time() - start:.0f} s: {path.stem}', flush=True)


def scaled_and_shifted(logits, targs):
    "a x + b, each fifth of the rows with the a and b that are fitted to the others"
    res, folds = logits.clone(), torch.randperm(len(logits), generator=torch.Generator().manual_seed(0)).chunk(5)
    for i, rows in enumerate(folds):
        others = torch.cat(folds[:i] + folds[i+1:])
        fit = LogisticRegression(C=np.inf).fit(logits[others].reshape(-1, 1), targs[others].flatten())
        res[rows] = logits[rows] * fit.coef_.item() + fit.intercept_.item()
    return res


def accuracy(yes, targs): return (yes == targs.bool()).double().mean().item()


def f1(yes, targs): return (2 * (yes * targs).sum() / (yes.sum() + targs.sum())).item()


def at_best(probs, targs, score):
    "Mean score of both halves of the rows, each at the threshold that is best for the other"
    halves = [(probs[o], targs[o]) for o in torch.randperm(len(probs), generator=torch.Generator().manual_seed(0)).chunk(2)]
    def threshold(p, y): return max(p.flatten().quantile(torch.linspace(.02, .999, 300).double()).tolist(), key=lambda t: score(p > t, y))
    return np.mean([score(p > threshold(*other), y) for (p, y), other in zip(halves, halves[::-1])])


def test_measures(logits, targs):
    probs, rare = logits.sigmoid(), targs.mean(0).argsort()[:round(.3 * targs.shape[1])]
    res = dict(mAP=100 * average_precision_score(targs, probs), temperature=best_temperature(logits, targs))
    for name, score in (('accuracy', accuracy), ('f1', f1)):
        res |= {name: 100 * score(probs > .5, targs), 'best_' + name: 100 * at_best(probs, targs, score)}
    for prefix, z in (('', logits), ('t_', cross_fitted(logits, targs)), ('ab_', scaled_and_shifted(logits, targs))):
        res |= {prefix + 'nll': row_nll(z, targs).mean().item(), prefix + 'ece': calibration_error(z.sigmoid(), targs).item()}
        if prefix != 't_': res[prefix + 'aurc'] = 1000 * aurc(z.sigmoid(), targs, n_boot=1).aurc # a temperature hardly changes it
    return res | dict(predicted=probs.mean().item(), share=targs.mean().item(), rare=probs[:, rare].mean().item(),
                      rare_share=targs[:, rare].mean().item())


def measured(run, path):
    "A row: what is measured of one training. It is kept beside the logits."
    kept = path.with_suffix('.json')
    if kept.exists() and kept.stat().st_mtime > path.stat().st_mtime: return json.loads(kept.read_text())
    with np.load(path) as f: o = {k: torch.from_numpy(f[k]).double() for k in f.files}
    row = run._asdict() | dict(seconds=o['seconds'].item()) | test_measures(o['test'], o['test_targs'])
    row['valid_t_nll'] = row_nll(cross_fitted(o['valid'], o['valid_targs']), o['valid_targs']).mean().item()
    kept.write_text(json.dumps(rounded(row)))
    return json.loads(kept.read_text())


def sources(file):
    "{name: function of the seed that gives training, validation and test arrays} of what there is, and why the rest is not"
    if Path(file).is_file(): return dict(pairs=digit_pairs, yeast=partial(yeast, file)), []
    print(skipped := f'yeast, as there is no file {Path(file).name}', flush=True)
    return dict(pairs=digit_pairs), [skipped]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--yeast', required=True, help='the file yeast.csv.gz')
    p.add_argument('--logits', type=Path, default=Path(tempfile.gettempdir()) / 'labels_logits', help='folder to keep the logits in')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--measure', action='store_true', help='train nothing, measure what there is')
    p.add_argument('--quick', action='store_true', help='one seed, 1 epoch, clean labels; writes nothing')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        seeds, folder = (1, Path(tmp)) if args.quick else (args.seeds, args.logits)
        arrays_of, skipped = sources(args.yeast)
        runs = all_runs(seeds, arrays_of, args.quick)
        if not args.measure: train_all(runs, arrays_of, folder, args.quick)
        rows = [measured(o, file_of(folder, o)) for o in runs if file_of(folder, o).exists()]
    command = shlex.join(['python', 'benchmarks/labels.py', '--yeast', 'FILE', '--seeds', str(seeds)])
    out = dict(machine=machine('cpu'), command=command, skipped=skipped, rows=rows)
    if args.quick: print(markdown(out))
    else: save(Path(__file__), out, markdown(out))


if __name__ == '__main__': main()
