"Every model of the zoo: builds, runs, learns, and says the same of a field whatever else is in the batch"
import os
from functools import cache
from itertools import product
import pytest, torch
from torch.nn.functional import cross_entropy
from crop2seg.models.zoo import MODELS, build_model, fit, measure, models, predict

torch.set_num_threads(1)
UNET = dict(widths=(4, 4, 8), decoder=(4, 4), n_head=2, d_model=8)
TINY = { # the least widths of each entry; one without a line here is tried at its full width
    'utae': UNET, 'timeunet': UNET, 'timeunet-nano': UNET, 'wtae': UNET, 'tempcnn': dict(width=4, spread=(1, 2), n_head=2, chunk=4000),
    'pixel-ltae': dict(widths=(4, 8), decoder=(4,), n_head=2, d_model=8, d_k=4, block=4000),
    **dict.fromkeys(('convlstm', 'convgru', 'biconvlstm'), dict(hidden=2)),
    'fpn-convlstm': dict(widths=(2, 4), steps=(1, 2), size=5, joined=4, hidden=2), 'unet3d': dict(widths=(2, 4)),
    'uconvlstm': dict(widths=(4, 4), decoder=(4,), hidden=2), 'unet-naive': dict(widths=(4, 4), decoder=(4,)), 'tsvit': dict(width=8, depth=(1, 1), n_head=2, patch=8, reach=2),
    'exchanger': dict(width=4, n_tokens=2, n_rounds=1, n_head=2, widths=(4, 4), decoder=(4,)),
    'forest': dict(n_trees=3, max_pixels=200), 'boosting': dict(n_rounds=2, max_pixels=200)}
WIDE = {*MODELS} - {*TINY} # name a size for them, or this takes minutes
KS, TS, SIZES, BANDS = (2, 15, 20), (1, 2, 7, 30, 61), (32, 64, 100, 128), 3
NETS = [n for n, e in MODELS.items() if e.kind == 'net']
each, each_net = pytest.mark.parametrize('name', MODELS), pytest.mark.parametrize('name', NETS)

def series(t, h, w=None, seed=0, c=BANDS): # One sample: frames, days (31 December and days 365, 366 and 430 among them), pad, clear
    g = torch.Generator().manual_seed(seed)
    days = torch.cat([torch.tensor([121, 365, 366, 0, 430, 122])[:t], 123 + torch.randperm(242, generator=g)[:max(0, t - 6)]])
    x, clear = torch.randn(1, t, c, h, w or h, generator=g), torch.rand(1, t, h, w or h, generator=g) > .3
    return x, days[None], torch.zeros(1, t, dtype=torch.bool), clear

def made(name, k=5): # A small model in eval mode; statistics and head are stirred, so that nothing is zero by chance
    torch.manual_seed(0)
    model = build_model(name, n_bands=BANDS, n_classes=k, **TINY.get(name, {}))
    if MODELS[name].kind == 'classic': return grown(name, k)
    for n, a in model.named_buffers():
        if n.endswith('running_mean'): a.normal_(0, .1)
        if n.endswith('running_var'): a.uniform_(.5, 1.5)
    with torch.no_grad():
        for p in model.head.parameters(): p.add_(.3*torch.randn_like(p))
    return model.eval()

@cache
def grown(name, k): # Trees for `made`
    model = build_model(name, n_bands=BANDS, n_classes=k, **TINY[name])
    return fit(model, [(*series(9, 16), torch.arange(256).reshape(1, 16, 16) % k)])

def runs(model, batch, k, learns=True): # Finite logits, and finite gradients where there are any
    size = batch[0].shape[-2:]
    learns = learns and any(p.requires_grad for p in model.parameters())
    with torch.set_grad_enabled(learns): logits = model.train(learns)(*batch)
    assert logits.shape == (len(batch[0]), k, *size) and logits.isfinite().all()
    if not learns: return
    cross_entropy(logits, torch.arange(logits[0, 0].numel()).reshape(1, *size) % k).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)

@each
def test_every_length_size_and_number_of_classes(name): # classes in turn; CROP2SEG_SLOW=1 tries every one in every cell
    cells = list(product(TS, SIZES))
    for i, (t, size) in enumerate(cells): runs(made(name, KS[i % 3]), series(t, size), KS[i % 3])
    for k, (t, size) in product(KS, cells if os.environ.get('CROP2SEG_SLOW') else cells[:12:4]): runs(made(name, k), series(t, size), k)

@each_net
def test_full_width(name): runs(build_model(name, n_bands=10, n_classes=15), series(2, 32, c=10), 15)

@torch.no_grad()
def keeps(model): # The promises, as names of those that are broken
    broken = []
    def same(what, a, b):
        if not (a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-5)): broken.append(what)
    cat = lambda *batches: tuple(torch.cat(z) for z in zip(*batches))
    add = lambda z, n, v: torch.cat([z, torch.full_like(z[:, :1], v).repeat_interleave(n, 1)], 1)
    for size in ((5, 13), (1, 1), (16, 16)):
        one, mate = series(7, *size), series(7, *size, seed=1)
        one[3][:, 4] = False; one[3][:, 0] |= ~one[3].any(1) # day 430 is clear nowhere, each pixel is clear somewhere
        alone = model(*one)
        if not alone.isfinite().all(): broken.append('finite')
        wide = tuple(add(z, 3, v) for z, v in zip(one, (1e3, 200, True, True)))
        longer = tuple(torch.cat([a, b[:, :3]], 1) for a, b in zip(mate, series(3, *size, seed=2)))
        same('padding', model(*wide), alone); same('padding', model(*wide[:3]), model(*one[:3]))
        same('mates', model(*cat(one, mate))[:1], alone); same('mates', model(*cat(mate, one, mate))[1:2], alone)
        same('padding beside a longer mate', model(*cat(wide, longer))[:1], alone)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
        same('order', model(*(z[:, order] for z in one)), alone)
        for v in (torch.nan, 1e3):
            bad = one[0].clone(); bad[:, 4] = v
            same('cloud', model(bad, *one[1:]), alone)
        same('cloud', model(*(z[:, [0, 1, 2, 3, 5, 6]] for z in one)), alone)
        nan, mean = (model(one[0].masked_fill(~one[3][:, :, None], v), *one[1:]) for v in (torch.nan, 0))
        same('hole', nan, mean)
        gone = torch.zeros_like(one[3]) # never clear: as if nothing was said
        same('never clear', model(*one[:3], gone), model(*one[:3]))
        for days in ([121], [365], [366], [0, 121, 365, 366, 430]):
            few = (one[0][:, :len(days)], torch.tensor([days]), one[2][:, :len(days)])
            if not model(*few).isfinite().all(): broken.append('leap days')
    return broken

@each
def test_promises(name):
    assert keeps(made(name)) == []
    with pytest.raises(ValueError, match='only padded dates'): made(name)(*(z if z.dtype != torch.bool or z.ndim > 2 else ~z for z in series(3, 4)))

@pytest.mark.parametrize('name', ('tempcnn', 'pixel-ltae', 'forest', 'boosting'))
def test_models_of_single_pixels(name): # neither neighbours nor what stands under a cloud
    x, days, pad, clear = series(7, 5, 13)
    clear[:, 0] |= ~clear.any(1)
    with torch.no_grad():
        whole = (model := made(name))(torch.where(clear[:, :, None], x, torch.nan), days, pad, clear)
        assert torch.allclose(whole, model(x, days, pad, clear), rtol=0, atol=1e-5)
        assert torch.allclose(whole[..., 2:3, 4:6], model(x[..., 2:3, 4:6], days, pad, clear[..., 2:3, 4:6]), rtol=0, atol=1e-5)

BREAKS = { # each breaks a model in one way that some network has been broken before
    'padding': lambda m, x, days, pad, clear=None: m(x, days, torch.zeros_like(pad), clear),
    'mates': lambda m, x, days, pad, clear=None: (z := m(x, days, pad, clear)) + z.mean(0),
    'order': lambda m, x, days, pad, clear=None: m(x, torch.arange(x.shape[1])[None].expand_as(days), pad, clear),
    'cloud': lambda m, x, days, pad, clear=None: m(x, days, pad),
    'never clear': lambda m, x, days, pad, clear=None: m(x, days, pad, clear) + (0. if clear is None else clear.any(1).float()[:, None] - 1),
    'leap days': lambda m, x, days, pad, clear=None: m(x, days, pad, clear) + torch.where((days % 400 > 365).any(), torch.nan, 0.)}

@pytest.mark.parametrize('trap', BREAKS)
def test_a_broken_promise_is_seen(trap):
    model = made('pixel-ltae')
    assert trap in keeps(lambda *batch: BREAKS[trap](model, *batch))

@each
def test_fit_and_predict(name):
    *batch, labels = *series(5, 8), torch.arange(64).reshape(1, 8, 8) % 2
    model = fit(build_model(name, BANDS, 3, **TINY.get(name, {})), iter([(*batch, labels), (*batch, labels*0 + 9)]), void=9, steps=2)
    probs = predict(model, batch)
    assert probs.shape == (1, 3, 8, 8) and torch.allclose(probs.sum(1), torch.ones(1, 8, 8), atol=1e-5) and not model.training

@each_net
def test_arrays_that_do_not_belong_together(name): # never stretched over each other
    model, one = made(name), series(4, 8)
    two = tuple(torch.cat([z, z]) for z in one)
    for learns in (False, True):
        for i in (1, 2, 3):
            for wrong in (two[i][:1], two[i][:, :3]):
                with pytest.raises(ValueError, match='cut them alike'): model.train(learns)(*two[:i], wrong, *two[i + 1:])
        with pytest.raises(ValueError, match='cut them alike'): model.train(learns)(*two[:3], two[3][..., :1, :1])
        with pytest.raises(ValueError, match='True and False'): model.train(learns)(*two[:2], two[2].int())

def test_words():
    assert not WIDE
    for args in (dict(name='tempnet'), dict(name=None), dict(name=['utae'])):
        with pytest.raises(ValueError, match='choose from .*tempcnn'): build_model(**args)
    for name in MODELS:
        for kw in (dict(n_classes=1), dict(n_classes=1.5), dict(n_classes=True), dict(n_classes='2'), dict(n_bands=0), dict(n_bands=None)):
            with pytest.raises(ValueError, match='give a whole number from'): build_model(name, **kw)
        with pytest.raises(ValueError, match='takes no argument colour; it knows n_classes, n_bands'): build_model(name, colour=1)
    assert [r['name'] for r in models()] == list(MODELS) and all((r['parameters'] is None) == (r['kind'] == 'classic') for r in models())
    assert measure('forest') == dict(name='forest', kind='classic', parameters=None, gmac=None, sight=1, memory_mb=None)
