"Real digits, from files to a Learner that was exported and loaded again: the ways of use that users type."
import json, os, subprocess, sys, textwrap, warnings

import pytest
from helpers import *
from fastai.vision.all import *
from fastai_smooth.all import *

for name in [n for n in globals() if n.startswith('test')]: del globals()[name]  # fastcore's test_eq and friends


def small_net():
    "A convolutional net that learns two pasted digits in a few seconds"
    torch.manual_seed(0)
    return nn.Sequential(ConvLayer(3, 16, stride=2), ConvLayer(16, 32, stride=2), ConvLayer(32, 64, stride=2),
                         nn.Flatten(), nn.Linear(64*16, 10))


def passed_as_loss_func(dls):
    return vision_learner(dls, resnet18, pretrained=False, loss_func=LabelSmoothingCrossEntropyFlat(eps=.1))
def keyword(dls): return vision_learner(dls, resnet18, pretrained=False, label_smoothing=.1)
def method(dls): return vision_learner(dls, resnet18, pretrained=False).to_smooth(.1)
def callback(dls): return Learner(dls, small_net(), metrics=accuracy_multi).add_cb(MultiLabelSmoothingCallback())


USES = dict(passed_as_loss_func=passed_as_loss_func, keyword=keyword, method=method, callback=callback)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "On a busy machine the threads of a small net mostly wait for each other"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('end_to_end')


@pytest.fixture(scope='module')
def digits(folder): return digits_dls(write_digits(folder/'digits', 120))


@pytest.fixture(scope='module')
def pairs(folder): return pairs_dls(folder/'pairs', write_pairs(folder/'pairs', 120))


@pytest.fixture(scope='module')
def trained(folder, digits, pairs):
    "One trained and exported Learner for each use, with what it said of one image before it was exported."
    res = {}
    for name, make in USES.items():
        torch.manual_seed(0); np.random.seed(0); random.seed(0)
        dls = pairs if name == 'callback' else digits
        learn = quiet(make(dls))
        learn.path = folder
        learn.fit_one_cycle(3, 5e-3)
        losses = [v[0] for v in learn.recorder.values]  # validate and get_preds start a new record
        item = folder/'pairs'/'3.png' if name == 'callback' else dls.valid_ds.items[0]
        said = learn.predict(item)
        learn.export(f'{name}.pkl')
        res[name] = SimpleNamespace(learn=learn, item=item, said=said, losses=losses, file=folder/f'{name}.pkl')
    return res


@pytest.mark.parametrize('name', USES)
def test_it_trains(trained, name):
    "The smoothed training loss falls, epoch by epoch"
    first, second, third = trained[name].losses
    assert third < second < first and third < .95*first


@pytest.mark.parametrize('name', USES)
def test_it_predicts(trained, name):
    use = trained[name]
    label, decoded, probs = use.said
    assert probs.shape == (10,) and ((0 <= probs) & (probs <= 1)).all()
    if name == 'callback': assert torch.equal(decoded, probs > .5)
    else:
        assert abs(probs.sum().item()-1) < 1e-5 and decoded == probs.argmax()
        assert label == use.learn.dls.vocab[decoded]


@pytest.mark.parametrize('name', USES)
def test_it_shows_results(trained, name):
    plt.close('all')
    trained[name].learn.show_results(max_n=4)
    assert len(plt.gcf().axes) >= 4
    plt.close('all')


@pytest.mark.parametrize('name', USES)
def test_it_loads(trained, name):
    use = trained[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = quiet(load_learner(use.file))
    torch.testing.assert_close(loaded.predict(use.item)[2], use.said[2])


def test_it_loads_where_there_is_no_triton_and_no_gpu(trained, tmp_path):
    "On another machine: a new process that knows fastai and this package, and cannot import triton"
    code = textwrap.dedent('''
        import json, sys, warnings
        warnings.simplefilter('ignore')
        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] == 'triton': raise ModuleNotFoundError(f"No module named '{name}'")
        sys.meta_path.insert(0, NoTriton())
        from fastai.learner import load_learner
        res = {}
        for name, (file, item) in json.load(open(sys.argv[1])).items():
            learn = load_learner(file)
            res[name] = learn.predict(item)[2].tolist()
        assert 'triton' not in sys.modules
        print(json.dumps(res))''')
    jobs = tmp_path/'jobs.json'
    jobs.write_text(json.dumps({n: (str(u.file), str(u.item)) for n, u in trained.items()}))
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': os.pathsep.join(sys.path)}
    env.pop('TRITON_INTERPRET', None)
    done = subprocess.run([sys.executable, '-c', code, str(jobs)], capture_output=True, text=True, env=env,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    probs = json.loads(done.stdout.strip().splitlines()[-1])
    for name, use in trained.items(): torch.testing.assert_close(tensor(probs[name]), use.said[2], atol=1e-5, rtol=1e-4)


def same(a, b): torch.testing.assert_close(*(o.as_subclass(torch.Tensor) for o in (a, b)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', ['keyword', 'method'])
def test_top_losses_are_hard(trained, name):
    "Interpretation reports -log p of the label, item by item"
    learn = trained[name].learn
    interp = ClassificationInterpretation.from_learner(learn)
    probs, targs = learn.get_preds()
    hard = -probs.log()[range(len(targs)), targs]
    same(interp.losses, hard)
    interp.plot_top_losses(4)
    assert len(plt.gcf().axes) >= 4
    plt.close('all')


def test_interpretation_of_a_loss_passed_as_loss_func(trained):
    "It smooths always, as fastai's does, in the losses shown too"
    learn = trained['passed_as_loss_func'].learn
    interp = Interpretation.from_learner(learn)
    probs, targs = learn.get_preds()
    logp = probs.log()
    smooth = -.9*logp[range(len(targs)), targs] - .1*logp.mean(1)
    same(interp.losses, smooth)
    interp.plot_top_losses(2)
    plt.close('all')


def test_interpretation_of_multi_label(trained):
    learn = trained['callback'].learn
    interp = Interpretation.from_learner(learn)
    probs, targs = learn.get_preds()
    hard = F.binary_cross_entropy(probs, targs.float(), reduction='none').mean(1)
    same(interp.losses, hard)
    interp.plot_top_losses(2)
    plt.close('all')


def test_validation_losses_of_hard_and_smooth_training_are_comparable(trained):
    "Hard for `label_smoothing=` and the callback; smoothed for a loss passed as loss_func"
    for name in ('keyword', 'callback'):
        learn = trained[name].learn
        loss = learn.validate()[0]
        probs, targs = learn.get_preds()
        hard = (F.binary_cross_entropy(probs, targs.float()) if name == 'callback'
                else F.nll_loss(probs.log(), targs))
        assert abs(loss-hard.item()) < 1e-3


def test_lr_find_and_fine_tune(digits, tmp_path):
    learn = quiet(vision_learner(digits, resnet18, pretrained=False, label_smoothing=.1, path=tmp_path))
    found = learn.lr_find(num_it=12, show_plot=True)
    plt.close('all')
    assert 0 < found[0] < 10
    learn.fine_tune(1, 2e-3)
    assert len(learn.recorder.values) == 1 and learn.loss_func.eps == .1
