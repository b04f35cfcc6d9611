"The fast way through the main nets against the plain one, the published weights against their own outputs, files of ONNX against their nets"
import copy, os, pickle, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, xarray as xr
from crop2seg.bands import BANDS
from crop2seg.mapping import predict_map
from crop2seg.models.seasonal import plainly
from crop2seg.models.timeunet import TimeUNet
from crop2seg.models.utae import UTAE, load_utae_paps
from crop2seg.models.wtae import WTAE
from crop2seg.portable import OnnxNet, export_onnx, fastest

NETS = [UTAE, TimeUNet, WTAE]
SMALL = dict(widths=(16, 16, 16, 32), decoder=(16, 16, 16), n_head=8, d_model=32)
OPTIONS = [dict(), dict(norm='group'), dict(conv='separable', squeeze=True), dict(conv='mbconv', clock='both', linear=True, queries=2),
           dict(clock='doy', boundary=True), dict(clock='thermal', use_clear=False)]
oracle = Path(__file__).parents[2]/'shared'/'oracles'/'utae_t5_64'
published = pytest.mark.skipif(not oracle.is_dir(), reason=f'no published weights at {oracle.parent.name}/{oracle.name}')

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1); yield
    torch.set_num_threads(before)

def season(b=2, t=7, h=13, w=9, seed=0):
    "Frames, days, padding and what is clear, each drawn."
    g = torch.Generator().manual_seed(seed)
    days = torch.randperm(431, generator=g)[:t].sort().values.repeat(b, 1)
    return torch.randn(b, t, 10, h, w, generator=g), days, torch.zeros(b, t, dtype=torch.bool), torch.rand(b, t, h, w, generator=g) > .4

def net_of(cls, **options):
    "A net whose norms have seen something, as after training; its logits are some units large."
    torch.manual_seed(0)
    net = cls(5, **(SMALL | options))
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 2)
    torch.nn.init.normal_(net.head.weight)
    return net.eval()

def differs(a, b): return (a - b).abs().max().item()

@pytest.mark.parametrize('cls', NETS)
def test_fast_is_plain(cls):
    for options in OPTIONS + [dict(skips='att_mean'), dict(skips='mean')]*(cls is UTAE):
        net = net_of(cls, **options)
        plain = copy.deepcopy(net)
        for m in plain.modules(): m.folds = False
        for t, h, w in ((7, 13, 9), (2, 16, 24), (1, 1, 1)):
            x, days, pad, clear = season(t=t, h=h, w=w)
            if t > 4: pad[0, 4:] = True; clear[1, 3] = False
            asked = dict(return_attention=True, return_boundary=net.edge is not None)
            for seen in (None, clear):
                with torch.inference_mode():
                    for a, b in zip(net(x, days, pad, seen, **asked), plainly(plain, x, days, pad, seen, **asked)):
                        assert a.shape == b.shape and differs(a, b) < 1e-5*max(1, b.abs().max()), options

@pytest.mark.parametrize('cls', NETS)
def test_padding_and_company_change_nothing(cls):
    net, (x, days, pad, clear) = net_of(cls), season(b=3)
    junk = x.clone()
    pad[1, 2:5], junk[1, 2:5], clear[2, 6], junk[2, 6] = True, 1e4, False, torch.nan
    with torch.inference_mode():
        whole = net(junk, days, pad, clear)
        assert whole.isfinite().all()
        keep = ~pad[1]
        assert differs(whole[1:2], net(x[1:2, keep], days[1:2, keep], pad[1:2, keep], clear[1:2, keep])) < 1e-5
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        assert differs(whole, net(junk[:, order], days[:, order], pad[:, order], clear[:, order])) < 1e-5
        assert differs(whole[:1], net(x[:1], days[:1], pad[:1], clear[:1])) < 1e-5

@pytest.mark.parametrize('cls', NETS)
def test_half_precision_is_near(cls):
    net, (x, days, pad, clear) = net_of(cls), season(h=32, w=32)
    with torch.inference_mode():
        full = net(x, days, pad, clear)
        with torch.autocast('cpu', torch.bfloat16): short = net(x, days, pad, clear)
    assert short.isfinite().all() and differs(short.float(), full) < .1*full.abs().max()
    assert (short.argmax(1) == full.argmax(1)).float().mean() > .9

@pytest.mark.parametrize('cls', NETS)
def test_training_takes_the_same_way(cls):
    net, (x, days, pad, clear) = net_of(cls, norm='group'), season(h=16, w=16)
    pad[0, 5:], x[0, 5:] = True, 0
    got = []
    for answer in (lambda: net(x, days, pad, clear), lambda: plainly(net, x, days, pad, clear)):
        net.train()
        for m in net.modules():
            if isinstance(m, (torch.nn.Dropout, torch.nn.BatchNorm2d)): m.eval()
        net.zero_grad(); out = answer(); out.square().mean().backward()
        got.append((out.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    (a, ga), (b, gb) = got
    assert differs(a, b) < 1e-4 and len(ga) == len(gb)
    assert max(differs(p, q)/(1e-3 + q.abs().max().item()) for p, q in zip(ga, gb)) < 1e-3

def held(): return {k: torch.from_numpy(v) for k, v in np.load(oracle/'io.npz').items()}

@pytest.fixture(scope='module')
def ancestor(): return load_utae_paps(oracle/'model.pth.tar')

@published
def test_published_weights_give_published_outputs(ancestor):
    io = held()
    with torch.inference_mode(): logits, attention = ancestor(io['x'], io['days'], torch.zeros(io['days'].shape, dtype=torch.bool), return_attention=True)
    assert logits.shape == io['logits'].shape and attention.shape == io['attention'].shape
    assert differs(logits, io['logits']) < 1e-4 and differs(attention, io['attention']) < 1e-4

@published
def test_published_weights_one_by_one_and_on_other_sizes(ancestor):
    io = held()
    none = torch.zeros(1, io['days'].shape[1], dtype=torch.bool)
    with torch.inference_mode():
        for b in range(len(io['x'])): assert differs(ancestor(io['x'][b:b+1], io['days'][b:b+1], none), io['logits'][b:b+1]) < 1e-4
        part = ancestor(io['x'][:1, ..., :40, :24], io['days'][:1], none)
        assert part.shape[-2:] == (40, 24)
        odd = ancestor(io['x'][:1, ..., :37, :21], io['days'][:1], none)  # filled up inside, cut again
        assert odd.shape[-2:] == (37, 21) and odd.isfinite().all() and (odd >= 0).all()

@published
def test_the_ancestor_counts_padding_and_looks_away(ancestor):
    "Features of padded frames are zero, attention gives them nothing, but the norm before it counts them."
    io = held()
    x, days = io['x'][:1, ..., :32, :32], io['days'][:1]
    pad = torch.zeros(days.shape, dtype=torch.bool)
    longer = torch.cat([x, torch.full_like(x[:, :2], 7)], 1), torch.cat([days, days[:, :2]], 1), torch.cat([pad, ~pad[:, :2]], 1)
    with torch.inference_mode():
        alone, attention = ancestor(x, days, pad, return_attention=True)
        padded, looked = ancestor(*longer, return_attention=True)
        other = ancestor(torch.cat([x, torch.zeros_like(x[:, :2])], 1), *longer[1:])
    assert (looked[:, :, 5:] == 0).all() and looked.sum(2).allclose(torch.ones(()))
    assert differs(padded, other) == 0 and differs(padded, alone) > 1e-3

class Bomb:
    def __reduce__(self): return os.mkdir, (str(Bomb.where),)

def test_a_malicious_checkpoint_is_refused(tmp_path):
    Bomb.where = tmp_path/'opened'
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'epoch': Bomb()}, tmp_path/'model.pth.tar')
    (tmp_path/'old.pth.tar').write_bytes(pickle.dumps({'state_dict': Bomb()}))
    for name in ('model.pth.tar', 'old.pth.tar'):
        with pytest.raises(ValueError, match='holds more than arrays or is damaged'): load_utae_paps(tmp_path/name)
    assert not Bomb.where.exists()

@published
def test_a_checkpoint_is_measured_before_it_is_built(tmp_path): # neither a packed one nor one whose sizes multiply
    path = oracle/'model.pth.tar'
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path/'packed.pth.tar', 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist(): new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match='damaged'): load_utae_paps(tmp_path/'packed.pth.tar')
    state = torch.load(path, weights_only=True)['state_dict']
    for odd in (torch.ones(2**17, 1, 1, 1), -state['out_conv.conv.conv.1.running_var'], torch.ones(4).bool()):
        name = 'out_conv.conv.conv.1.running_var' if odd.ndim == 1 else 'in_conv.conv.conv.3.weight'
        torch.save({'state_dict': state | {name: odd}}, tmp_path/'odd.pth.tar')
        with pytest.raises(ValueError, match='no whole checkpoint'): load_utae_paps(tmp_path/'odd.pth.tar')

@pytest.mark.parametrize('cls', NETS)
def test_a_file_of_onnx_is_its_net(cls, tmp_path):
    for package in ('onnx', 'onnxruntime'): pytest.importorskip(package)
    for options in (OPTIONS[0], OPTIONS[3], OPTIONS[5]):
        net = net_of(cls, **options)
        file = OnnxNet(export_onnx(net, tmp_path/'net.onnx'))
        for t, h, w in ((9, 24, 40), (2, 13, 9), (1, 1, 1)):
            x, days, pad, clear = season(t=t, h=h, w=w, seed=t)
            if t > 4: pad[0, 4:] = True; x[0, 4:] = 1e3; clear[1, 3] = False
            with torch.inference_mode():
                for seen in (None, clear): assert differs(file(x, days, pad, seen), net(x, days, pad, seen)) < 1e-4, (options, t, h, w)
    assert [p.name for p in tmp_path.iterdir()] == ['net.onnx'] and not net.training

def test_the_faster_way_is_measured(tmp_path):
    for package in ('onnx', 'onnxruntime'): pytest.importorskip(package)
    net = net_of(TimeUNet)
    chosen, said = fastest(net, *season(b=1, h=16, w=16), rounds=1)
    assert set(said) == {'torch', 'onnx'} and (chosen is net) == (said['torch'] <= said['onnx'])
    chosen, said = fastest(torch.nn.Identity(), *season(b=1))
    assert isinstance(chosen, torch.nn.Identity) and 'cannot be exported' in said['why']

def test_a_map_is_the_same_from_a_file(tmp_path):
    for package in ('onnx', 'onnxruntime'): pytest.importorskip(package)
    net, (x, days, _, clear) = net_of(WTAE), season(b=1, h=20, w=28)
    clear[:, 2] = False  # one date is lost to clouds
    cube = xr.Dataset({'reflectance': (('time', 'band', 'y', 'x'), x[0].numpy()), 'clear': (('time', 'y', 'x'), clear[0].numpy())},
                      coords=dict(time=pd.Timestamp(2018, 9, 1) + pd.to_timedelta(days[0].numpy(), 'D'), band=list(BANDS)), attrs=dict(season_year=2019))
    run = dict(bands=list(BANDS), stats=dict(mean=[0.]*10, std=[1.]*10), legend=dict(ids=[0, 1, 2, 3, 4], void=5), model=dict(args=dict(n_classes=5)))
    maps = [list(predict_map(cube, m, run, window=16, overlap=4)) for m in (net, OnnxNet(export_onnx(net, tmp_path/'net.onnx')))]
    for (row, a), (same, b) in zip(*maps, strict=True): assert row == same and np.abs(a - b).max() < 1e-4
