"Data, models and Learners that the tests share: real digits where images matter, plain tensors where numbers do."
import matplotlib
matplotlib.use('Agg')

from fastai.vision.all import *
from fastai.tabular.all import Categorify, MultiCategoryBlock, Normalize, TabularDataLoaders, TabularPandas
from fastai.text.all import (AWD_LSTM, LMDataLoader, Numericalize, SortedDL, awd_lstm_clas_config, awd_lstm_lm_config,
                             pad_input_chunk)
from sklearn.datasets import load_digits

CPU = torch.device('cpu')
DIGITS = load_digits()  # 1,797 real scans, 8x8, values 0..16


# ---------------------------------------------------------------- plain tensors

def tensor_dls(x, y, bs=16, n_valid=None):
    """DataLoaders over the rows of `x` and `y` (a tensor, or a list of tensors for several targets), never shuffled,
    so that two Learners see the same batches; the last `n_valid` rows (a quarter) are the validation set."""
    xs, ys = L(x), L(y)
    items = list(zip(*xs, *ys))
    n = len(items)//4 if n_valid is None else n_valid
    res = DataLoaders(*[DataLoader(o, bs=bs, num_workers=0) for o in (items[:-n], items[-n:])], device=CPU)
    res.n_inp = len(xs)
    return res


def multi_dls(n=64, n_in=6, k=5, bs=16, dtype=torch.float32, seed=0):
    "Multi-label rows: `x` (n,n_in) normal, `y` (n,k) multi-hot of `dtype`."
    g = torch.Generator().manual_seed(seed)
    return tensor_dls(torch.randn(n, n_in, generator=g), (torch.rand(n, k, generator=g) < .4).to(dtype), bs)


def single_dls(n=64, n_in=6, k=4, bs=16, seed=0):
    "Single-label rows: `x` (n,n_in), `y` (n,) class indices that a linear model can mostly tell from `x`."
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, n_in, generator=g), torch.randn(n_in, k, generator=g)
    return tensor_dls(x, (x@w).argmax(1), bs)


def mlp(n_in=6, k=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n_in, 12), nn.Tanh(), nn.Linear(12, k))


def flat_mlp(k=5, seed=0):
    "For (n,1,8,8) images."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, k))


class RecurrentNet(nn.Module):
    "Returns what `RNNCallback` expects: logits, raw outputs and dropped-out outputs, each (bs,seq,hidden) in a list."
    def __init__(self, k=5):
        super().__init__()
        self.rnn, self.head = nn.RNN(1, 7, batch_first=True), nn.Linear(7, k)

    def forward(self, x):
        raw = self.rnn(x[..., None])[0]
        return self.head(raw[:, -1]), [raw], [raw*.9]

    def reset(self): pass


def rnn_net(k=5, seed=0):
    torch.manual_seed(seed)
    return RecurrentNet(k)


def tiny_arch(pretrained=False):
    "A body for `vision_learner` and `unet_learner` that costs next to nothing."
    return nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), nn.AdaptiveAvgPool2d(1))


def quiet(learn):
    "No progress bar, no printed table."
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn


def tensor_learner(dls, model, loss_func, path=None, **kwargs):
    "A quiet Learner with plain SGD, which keeps a small difference in the gradients small in the weights."
    return quiet(Learner(dls, model, loss_func=loss_func, opt_func=kwargs.pop('opt_func', SGD), lr=.1, path=path,
                         **kwargs))


def fit_seeded(learn, n_epoch=2, seed=42, **kwargs):
    torch.manual_seed(seed); np.random.seed(seed); random.seed(seed)
    learn.fit(n_epoch, **kwargs)
    return learn


def weights(learn): return torch.cat([p.detach().reshape(-1) for p in learn.model.parameters()])


# ---------------------------------------------------------------- spies

class Grads(Callback):
    "Keeps every gradient as the optimiser gets it (unscaled under fp16), one flat vector a step."
    order = 1000
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append(torch.cat([p.grad.reshape(-1).clone() for p in self.model.parameters()]))


class Spy(Callback):
    "Notes `(training, f(learn))` at each event named: `Spy(lambda l: l.loss, 'after_batch')`."
    def __init__(self, f, *events, order=0):
        self.f, self.order, self.seen = f, order, []
        for e in events: setattr(self, e, partial(self._note, e))
    def _note(self, name): self.seen.append((self.training, self.f(self.learn)))
    def train(self): return [o for training, o in self.seen if training]
    def valid(self): return [o for training, o in self.seen if not training]


class RaiseAt(Callback):
    "Raises `ex` at `event` of training batch `nth` (counted from 0 over the whole fit)."
    def __init__(self, ex, event='before_backward', nth=1, order=100):
        self.ex, self.nth, self.order, self.left = ex, nth, order, nth
        setattr(self, event, self._raise)
    def _raise(self):
        if not self.training: return
        self.left -= 1
        if self.left < 0:
            self.left = 10**9
            raise self.ex


# ---------------------------------------------------------------- real images

def write_digits(path, n=260):
    """`n` of scikit-learn's digits as PNG files, path/train/LABEL/I.png and path/valid/LABEL/I.png (every fifth),
    32x32 and grey."""
    for i in np.random.RandomState(0).permutation(len(DIGITS.target))[:n]:
        folder = path/('valid' if i % 5 == 0 else 'train')/str(DIGITS.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        PILImageBW.create((DIGITS.images[i]*15.9).astype(np.uint8)).resize((32, 32)).save(folder/f'{i}.png')
    return path


def digits_dls(path, bs=32):
    "DataLoaders of the folder that `write_digits` wrote."
    return ImageDataLoaders.from_folder(path, train='train', valid='valid', bs=bs, num_workers=0, device=CPU)


def write_pairs(path, n=260):
    "Two digits pasted on one 32x32 image, as PNG files, and a table of file name and labels ('3 7')."
    rng, rows = np.random.RandomState(1), []
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        canvas, pair = np.zeros((32, 32), dtype=np.uint8), rng.choice(len(DIGITS.target), 2, replace=False)
        for side, j in enumerate(pair):
            top, left = rng.randint(0, 17), 16*side
            canvas[top:top+16, left:left+16] = np.kron(DIGITS.images[j]*15.9, np.ones((2, 2))).astype(np.uint8)
        PILImageBW.create(canvas).save(path/f'{i}.png')
        rows.append((f'{i}.png', ' '.join(sorted({str(DIGITS.target[j]) for j in pair})), i % 5 == 0))
    return pd.DataFrame(rows, columns=['name', 'labels', 'valid'])


def pairs_dls(path, df, bs=32):
    "Multi-label DataLoaders: (bs,3,32,32) images, (bs,10) multi-hot targets."
    return ImageDataLoaders.from_df(df, path, label_delim=' ', valid_col='valid', bs=bs, num_workers=0, device=CPU)


# ---------------------------------------------------------------- segmentation, tabular, text

MASK_CODES = ['ground', 'left', 'right']
VOID = 255


def segment_arrays(n=24, size=32, seed=0):
    """Images (n,size,size,3) and masks (n,size,size), uint8: a bright block on the left or the right, and void pixels
    in the corner."""
    rng = np.random.RandomState(seed)
    imgs, masks = rng.randint(0, 60, (n, size, size)).astype(np.uint8), np.zeros((n, size, size), dtype=np.uint8)
    for i in range(n):
        side, top = i % 3 == 0, rng.randint(0, size//2)
        cols = slice(size//2, size) if side else slice(0, size//2)
        imgs[i, top:top+8, cols] = 230
        masks[i, top:top+8, cols] = 2 if side else 1
    masks[:, :3, :3] = VOID
    return np.stack([imgs]*3, axis=-1), masks


class At:
    "Picks row `i` of an array: a picklable `get_x`."
    def __init__(self, rows): self.rows = rows
    def __call__(self, i): return self.rows[i]


def segment_dls(imgs, masks, bs=6, n_valid=6):
    "Segmentation DataLoaders: (bs,3,32,32) images, (bs,32,32) masks of `MASK_CODES` and `VOID`."
    n = len(imgs)
    block = DataBlock((ImageBlock, MaskBlock(codes=MASK_CODES)), get_x=At(imgs), get_y=At(masks),
                      splitter=IndexSplitter(range(n-n_valid, n)))
    return block.dataloaders(list(range(n)), bs=bs, num_workers=0, device=CPU)


def tabular_frame(n=80, seed=0):
    rng = np.random.RandomState(seed)
    df = pd.DataFrame(dict(a=rng.randn(n), b=rng.randn(n), colour=rng.choice(['red', 'green', 'blue'], n)))
    df['kind'] = np.where(df.a > .8, 'high', np.where(df.a < -.3, 'low', 'mid'))
    df['tall'], df['wide'], df['deep'] = df.a > .5, df.b > -.7, df.colour == 'red'
    return df


def tabular_dls(df, bs=16, n_valid=20):
    "One categorical target, `kind`, of shape (bs,1)."
    return TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['colour'], cont_names=['a', 'b'],
                                      y_names='kind', y_block=CategoryBlock(), bs=bs, device=CPU, num_workers=0,
                                      valid_idx=list(range(len(df)-n_valid, len(df))))


MULTI_COLS = ['tall', 'wide', 'deep']


def tabular_multi_dls(df, bs=16, n_valid=20):
    "Three yes/no columns as one multi-label target: as fastai's tabular tutorial does."
    df = df.copy()
    df[MULTI_COLS] = df[MULTI_COLS].astype(float)
    to = TabularPandas(df, procs=[Categorify, Normalize], cat_names=['colour'], cont_names=['a', 'b'],
                       y_names=MULTI_COLS, y_block=MultiCategoryBlock(encoded=True, vocab=MULTI_COLS),
                       splits=(list(range(len(df)-n_valid)), list(range(len(df)-n_valid, len(df)))))
    return to.dataloaders(bs=bs, device=CPU, num_workers=0)


TEXTS = ['the cat sat on the mat and the dog sat too', 'a dog ran to the cat and the cat ran away',
         'the mat was on the floor and the floor was cold', 'a cold dog sat on a cold mat']*6
VOCAB = ['xxunk', 'xxpad', 'xxbos', 'xxfld'] + sorted({w for t in TEXTS for w in t.split()}) + ['never']


def _words(s): return s.split()


def lm_dls(bs=4, seq_len=8):
    "Language-model DataLoaders over `TEXTS`: the last 4 are the validation set."
    splits = (list(range(len(TEXTS)-4)), list(range(len(TEXTS)-4, len(TEXTS))))
    dsets = Datasets(TEXTS, [[_words, Numericalize(vocab=VOCAB)]], splits=splits, dl_type=LMDataLoader)
    return dsets.dataloaders(bs=bs, seq_len=seq_len, device=CPU)


def _animal(s): return 'cat' if 'cat' in s else 'dog'


def text_dls(bs=4):
    "Text classification DataLoaders: does a cat occur?"
    splits = (list(range(len(TEXTS)-4)), list(range(len(TEXTS)-4, len(TEXTS))))
    dsets = Datasets(TEXTS, [[_words, Numericalize(vocab=VOCAB)], [_animal, Categorize()]], splits=splits,
                     dl_type=SortedDL)
    return dsets.dataloaders(bs=bs, before_batch=pad_input_chunk, device=CPU)


def small_lm_config(): return {**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2}
def small_clas_config(): return {**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2}


# fastai's star import brings fastcore's test_eq and friends, which pytest would take for tests of ours
__all__ = [n for n in globals() if not n.startswith(('_', 'test'))]
