"""Label smoothing on real images: hard labels, uniform smoothing, and online smoothing; and which epoch a monitor picks.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --fashion DIR [--logits DIR] [--seeds 5] [--measure] [--quick]

DIR holds FashionMNIST/raw, as torchvision keeps it: a download, or the four files of the Debian package dataset-fashion-mnist. Without it, digits
alone are measured. The logits of each training are kept in the folder of --logits, outside of the repository: what is there is not trained again, so
a run which was stopped goes on when it is started again. At the end calibration.json and calibration.md are written beside this script; `--measure`
trains nothing and writes them of what there is. `--quick` tries one seed, two epochs and one noise, prints the tables and writes nothing: it shows
that the script runs, no more.

Data: scikit-learn's digits (1000 images to train on, 300 to validate, 497 to test) and FashionMNIST (4000, 1000, 10000), drawn anew by each seed. In
the training and validation parts a share of the labels is replaced by another class at random; the test part is clean. '40 classes' is FashionMNIST,
each image turned by 0, 90, 180 or 270 degrees at random: class x turn is what is to be told, with clean labels.
Models: an MLP 256-256 on the pixels, and a CNN (3 times convolution, batch norm, ReLU, pooling, of 16, 32 and 64 channels; then 128), by
`fit_one_cycle`. Methods: hard labels, `to_smooth(eps)` with eps .1 and .4, and `to_smooth(eps, prior='online')` with eps .5, .7 and .9. Runs with one
seed share split, noise, first weights and order of batches.

Measures are of the test part: accuracy; NLL and ECE (15 bins), raw and after a temperature (T), which is cross-fitted on the test rows themselves
(each fifth gets that of the others): it says what a temperature can do, not spoilt by the noise in validation labels. AURC is the area under the
risk-coverage curve, times 1000; a temperature changes it, as it moves rows with several likely classes. 'Form' is what `fit_temperature` makes of
it, which chooses a plain or a normalised temperature: each half of the test rows gets the one that is fitted to the other, and so it is for AURC T.
'Surest half' is the error, in %, among the surest half of the test images.

Which epoch: Fashion, noise 0 and .2, trained with a constant learning rate for so long that they overfit; all measures on the first 5000 test images.
The monitors see the noisy validation part: its loss as it is (`valid_loss`, hard labels, no temperature), its NLL after a cross-fitted temperature,
its error. Regret is what the epoch they pick loses against the best epoch in hindsight.

± is 1.96 standard errors over seeds, of paired differences where two methods are compared. Of five seeds such an interval holds the truth in 88 of 100
cases, not in 95, and of many comparisons some are beyond it by chance."""
import argparse, json, shlex, tempfile, time, warnings
from collections import namedtuple
from pathlib import Path

import numpy as np, torch
warnings.filterwarnings('ignore', category=FutureWarning) # of fastai's own use of torch.jit.script
from fastai.basics import *
from fastai.callback.schedule import *
from torch.utils.data import TensorDataset

from fastai_smooth.all import *
from fastai_smooth.cli import BadInput
from fastai_smooth.images import digits, fashion, flip_labels
from fastai_smooth.scaling import NormalizedTemperature, apply_temperature, cross_fitted, fitted_form, row_nll
from calibration_table import markdown
from machine import machine

NOISES = [0., .2, .4]
METHODS = {'hard': None, 'uniform .1': (.1, None), 'uniform .4': (.4, None), # eps and prior of `to_smooth`
           'online .5': (.5, 'online'), 'online .7': (.7, 'online'), 'online .9': (.9, 'online')}
SIZES = {'digits': (1000, 300), 'Fashion': (4000, 1000), '40 classes': (4000, 1000)} # to train on, to validate
EPOCHS = {('digits', 'MLP'): 40, ('digits', 'CNN'): 20, ('Fashion', 'MLP'): 20, ('Fashion', 'CNN'): 8, ('40 classes', 'CNN'): 8}
LONG, LONG_METHODS = dict(MLP=30, CNN=12), ('hard', 'uniform .1', 'online .5') # epochs with a constant learning rate
LR = dict(MLP=1e-3, CNN=3e-3)


class TensorLoader(DataLoader):
    "Cuts a batch out of a TensorDataset at once."
    def create_item(self, i): return i
    def create_batch(self, idxs): return self.dataset[list(idxs)]


def load(images):
    "Pixels in [0,1], (N,1,H,W), classes, and which are test images (None: the data set doesn't say)"
    return np.stack([o[..., 0] for o in images.images])[:, None].astype(np.float32) / 255, images.classes, images.is_valid


def turned(data, seed):
    "Each image turned by 0, 90, 180 or 270 degrees at random, as a class of its own: 4 times as many classes"
    x, y, is_test = data
    turns = np.random.default_rng([seed, 4]).integers(0, 4, len(y))
    return np.stack([np.rot90(o, t, (1, 2)) for o, t in zip(x, turns)]), 4 * y + turns, is_test


def parts(data, sizes, noise, seed):
    "Training, validation and test parts as TensorDatasets. `noise` of the labels of the first two are wrong."
    x, y, is_test = data
    idxs = np.random.default_rng([seed, 2]).permutation(len(y) if is_test is None else np.flatnonzero(~is_test))
    train, valid, rest = np.split(idxs, np.cumsum(sizes))
    noisy, x = flip_labels(y, noise, y.max() + 1, seed), (x - x[train].mean()) / x[train].std()
    test = rest if is_test is None else np.flatnonzero(is_test)
    return [TensorDataset(torch.tensor(x[i]), torch.tensor(labels[i])) for i, labels in ((train, noisy), (valid, noisy), (test, y))]


def mlp(size, k):
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, k))


def cnn(size, k):
    "Three times convolution, batch norm, ReLU and pooling, and a hidden layer; ReLU after pooling is the same, and faster"
    convs = [o for i, n in ((1, 16), (16, 32), (32, 64))
             for o in (nn.Conv2d(i, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.MaxPool2d(2), nn.ReLU())]
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(64 * (size // 8)**2, 128), nn.ReLU(), nn.Linear(128, k))
    return net.to(memory_format=torch.channels_last)


def get_learner(data, model, method):
    "A Learner with its first weights; `data` as `parts` gives them."
    dls = DataLoaders(*[TensorLoader(o, bs=64 if i == 0 else 1000, shuffle=i == 0) for i, o in enumerate(data[:2])])
    x, y = data[0].tensors
    learn = Learner(dls, dict(MLP=mlp, CNN=cnn)[model](x.shape[-1], 1 + y.max().item()), CrossEntropyLossFlat(), lr=LR[model])
    if METHODS[method] is None: return learn
    eps, prior = METHODS[method]
    return learn.to_smooth(eps, prior=prior)


@torch.no_grad()
def logits_of(net, part):
    net.eval()
    return torch.cat([net(x) for x in part.tensors[0].split(1000)])


class KeepLogits(Callback):
    "Logits of the validation and test parts, of each epoch (of the first 5,000 test images) or of the last alone"
    def __init__(self, data, every): self.data, self.every, self.valid, self.test = data, every, [], []

    def after_epoch(self):
        if not self.every and self.epoch < self.n_epoch - 1: return
        test = TensorDataset(*[o[:5000] for o in self.data[2].tensors]) if self.every else self.data[2]
        self.valid.append(logits_of(self.model, self.data[1]))
        self.test.append(logits_of(self.model, test))


Run = namedtuple('Run', 'data noise model method seed long')


def all_runs(seeds, data, quick=False):
    "Seed by seed, so that a run which is stopped has fewer seeds, not fewer cases. Then `long` ones, of which each epoch is kept."
    noises = [.2] if quick else NOISES
    for seed in range(seeds):
        yield from (Run(d, noise, model, m, seed, False) for d in data for noise in noises for model in ('MLP', 'CNN') for m in METHODS)
        if 'Fashion' in data: yield from (Run('40 classes', 0., 'CNN', m, seed, False) for m in METHODS)
    for seed in range(seeds if 'Fashion' in data else 0):
        yield from (Run('Fashion', noise, model, m, seed, True) for noise in noises[:2] for model in LONG for m in LONG_METHODS)


def file_of(folder, run): return folder / f'{"-".join(str(o).replace(" ", "") for o in run)}.npz'


def train(run, data, epochs, path):
    "Train one model, and keep its logits."
    start = time.time()
    with no_random(run.seed):
        learn, keep = get_learner(data, run.model, run.method), KeepLogits(data, run.long)
        with learn.no_bar(), learn.no_logging(): (learn.fit if run.long else learn.fit_one_cycle)(epochs, cbs=keep)
    valid, test = torch.stack(keep.valid), torch.stack(keep.test)
    part = path.with_name('part') # renamed when it is whole
    with part.open('wb') as f:
        np.savez(f, valid=valid, test=test, valid_targs=data[1].tensors[1], test_targs=data[2].tensors[1][:test.shape[1]],
                 seconds=time.time() - start)
    part.rename(path)


def train_all(runs, data, folder, quick=False):
    "Train what `folder` has no logits of."
    folder.mkdir(parents=True, exist_ok=True)
    last, start = None, time.time()
    for run in runs:
        if (path := file_of(folder, run)).exists(): continue
        if (case := (run.data, run.noise, run.seed)) != last:
            source = turned(data['Fashion'], run.seed) if run.data == '40 classes' else data[run.data]
            these, last = parts(source, SIZES[run.data], run.noise, run.seed), case
        epochs = LONG[run.model] if run.long else EPOCHS[run.data, run.model]
        train(run, these, 2 if quick else epochs, path)
        print(f'{time.time() - start:.0f} s: {path.stem}', flush=True)


def t_nll(logits, targs): return row_nll(cross_fitted(logits, targs), targs).mean().item()


def error_of(logits, targs): return (logits.argmax(1) != targs).double().mean().item()


def half_fitted(logits, targs, normalize):
    "Logits, each half with the temperature that `fit_temperature` takes of the other, and how many of the two are normalised"
    half = torch.randperm(len(targs), generator=torch.Generator().manual_seed(0)) % 2 == 0
    res, n = logits.clone(), 0
    for a, b in ((half, ~half), (~half, half)):
        t = fitted_form(logits[a], targs[a], normalize=normalize).used
        res[b], n = apply_temperature(logits[b], t), n + isinstance(t, NormalizedTemperature)
    return res, n


def test_measures(logits, targs):
    "All measures of test rows: raw, after a temperature, and where halves get that of each other, plain or of the form that is chosen"
    (form, n), (plain, _) = (half_fitted(logits, targs, o) for o in (None, False))
    res = dict(accuracy=100 * (1 - error_of(logits, targs)), temperature=best_temperature(logits, targs), normalized=n)
    for prefix, z in (('', logits), ('t_', cross_fitted(logits, targs)), ('plain_', plain), ('form_', form)):
        probs = z.softmax(1)
        res |= {prefix + 'nll': row_nll(z, targs).mean().item(), prefix + 'ece': calibration_error(probs, targs).item()}
        if prefix == 't_': continue # 'plain_' has it, of the same halves as 'form_'
        res |= {prefix + 'aurc': 1000 * aurc(probs, targs, n_boot=1).aurc, prefix + 'half': 100 * risk_at(risk_coverage(probs, targs), .5)}
    return res | dict(gap=logits.softmax(1).amax(1).mean().item() - res['accuracy'] / 100)


def valid_measures(logits, targs):
    return dict(valid_loss=row_nll(logits, targs).mean().item(), valid_t_nll=t_nll(logits, targs), valid_error=error_of(logits, targs))


def epoch_measures(logits, targs):
    probs = logits.softmax(1)
    return dict(accuracy=100 * (1 - error_of(logits, targs)), t_nll=t_nll(logits, targs), aurc=1000 * aurc(probs, targs, n_boot=1).aurc)


def rounded(o):
    if isinstance(o, float): return round(o, 6)
    return {k: rounded(v) for k, v in o.items()} if isinstance(o, dict) else [*map(rounded, o)] if isinstance(o, list) else o


def measured(run, path):
    "A row: what is measured of one training. It is kept beside the logits."
    kept = path.with_suffix('.json')
    if kept.exists() and kept.stat().st_mtime > path.stat().st_mtime: return json.loads(kept.read_text())
    with np.load(path) as f: o = {k: torch.from_numpy(f[k]) for k in f.files}
    valid, test = ([(z.double(), o[part + '_targs']) for z in o[part]] for part in ('valid', 'test'))
    row = run._asdict() | dict(seconds=o['seconds'].item())
    if run.long: row['epochs'] = [valid_measures(*v) | epoch_measures(*t) for v, t in zip(valid, test)]
    else: row |= test_measures(*test[-1]) | valid_measures(*valid[-1])
    kept.write_text(json.dumps(rounded(row)))
    return json.loads(kept.read_text())


def sources(root):
    "{name: data} of what there is, and why the rest is not"
    data, skipped = dict(digits=load(digits())), []
    try: data['Fashion'] = load(fashion(root))
    except BadInput: skipped.append('Fashion, as the folder of --fashion has no FashionMNIST/raw with its four files')
    for o in skipped: print(f'Left out: {o}', flush=True)
    return data, skipped


def save(here, out, text):
    rows = ',\n'.join('  ' + json.dumps(o) for o in out['rows']) # a line a row
    head = json.dumps({k: v for k, v in out.items() if k != 'rows'}, indent=1)
    here.with_suffix('.json').write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    here.with_suffix('.md').write_text(text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--fashion', required=True, help='folder that holds FashionMNIST/raw')
    p.add_argument('--logits', type=Path, default=Path(tempfile.gettempdir()) / 'calibration_logits', help='folder for the logits of each training')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--measure', action='store_true', help='train nothing, measure what there is')
    p.add_argument('--quick', action='store_true', help='one seed, 2 epochs, noise .2; writes nothing')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        seeds, folder = (1, Path(tmp)) if args.quick else (args.seeds, args.logits)
        data, skipped = sources(args.fashion)
        runs = list(all_runs(seeds, data, args.quick))
        if not args.measure: train_all(runs, data, folder, args.quick)
        rows = [measured(o, file_of(folder, o)) for o in runs if file_of(folder, o).exists()]
    command = shlex.join(['python', 'benchmarks/calibration.py', '--fashion', 'DIR', '--seeds', str(seeds)])
    out = dict(machine=machine('cpu'), command=command, skipped=skipped, rows=rows)
    if args.quick: print(markdown(out))
    else: save(Path(__file__), out, markdown(out))


if __name__ == '__main__': main()
