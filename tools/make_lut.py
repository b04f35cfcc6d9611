"""Make data/lut/canopy.npz, the table behind crop2seg.canopy: python tools/make_lut.py   (about ten minutes on one core)
Needs `pip install -e '.[lut]'`: prosail computes canopies, pyrsr holds ESA's spectral responses, earthlib the soils.
Deterministic on one machine: fixed seeds, one thread. What each part means is told in nbs/04_canopy.ipynb."""
import re, sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pandas as pd, torch
from prosail import spectral_lib
from prosail.FourSAIL import foursail
from prosail.prospect_d import calctav, prospect_d
from scipy.stats import poisson
from crop2seg.bands import BANDS
from crop2seg.canopy import canopy, features, over_soil, soil

OUT = Path(__file__).parents[1]/'data'/'lut'/'canopy.npz'
NM = np.arange(400, 2501)
LIMITS = dict(lai=(0, 8), ala=(20, 80), cab=(0, 90), car=(0, 25), cw=(0, .07), cm=(.001, .02), brown=(0, 1.5), n=(1, 2.6),
              sun=(20, 80), view=(0, 12), azimuth=(0, 180), hotspot=(0, .4))
SOILS = pd.read_csv(OUT.with_name('soils.csv'), index_col='name').earthlib_row
WETNESS = np.linspace(0, 1, 11)
HALE_QUERRY = np.array([[400, 1.339], [500, 1.335], [600, 1.332], [700, 1.331], [800, 1.329], [900, 1.328], [1000, 1.327],
                        [1200, 1.324], [1400, 1.321], [1600, 1.317], [1800, 1.312], [2000, 1.306], [2200, 1.296], [2400, 1.279]])

def package(name): return Path(find_spec(name).origin).parent

def responses(satellite='Sentinel-2A'):
    "Spectral response of each band at each nm (ESA, COPE-GSEG-EOPG-TN-15-0007 v3.0), sum 1."
    files = [package('pyrsr')/'data'/satellite/'MSI'/f"band_{b[1:].lstrip('0')}" for b in BANDS]
    weights = np.stack([np.interp(NM, *np.loadtxt(f, skiprows=1).T, left=0, right=0) for f in files])
    return weights/weights.sum(1, keepdims=True)

RESPONSE = responses()
USED = np.flatnonzero(RESPONSE.max(0) > 1e-4*RESPONSE.max())
WEIGHT = RESPONSE[:, USED]/RESPONSE[:, USED].sum(1, keepdims=True)
ABSORPTION = np.stack([RESPONSE @ getattr(spectral_lib.prospectd, k) for k in ('kab', 'kcar', 'kw', 'km', 'kbrown')]).astype('f4')

def dry_soils():
    "Laboratory spectra of dry ground, by name, at each nm; 10 nm steps are interpolated, two faulty channels left out."
    folder = package('earthlib')/'data'
    head = (folder/'spectra.sli.hdr').read_text()
    nm = np.array(re.search(r'wavelength = \{(.*?)\}', head, re.S)[1].split(','), float)*1000
    good = ~np.isin(nm.round(), (760, 1120))
    x = np.fromfile(folder/'spectra.sli', '<f4').reshape(-1, len(nm))
    return {name: np.interp(NM, nm[good], x[row][good]) for name, row in SOILS.items()}

def wet(
    dry, # reflectance at each nm
    wetness, # 0 = air dry, 1 = 55 % water by volume
):
    "Soil under films of water: Lekner & Dorf 1988, layers after Verhoef et al. 2018 and Yang et al. 2020 (BSM)."
    n, k = np.interp(NM, *HALE_QUERRY.T), spectral_lib.prospectd.kw
    inside = 1 - (1 - dry)*(dry*calctav(90, 2/n)/calctav(90, 2.) + 1 - dry)
    back, front = 1 - calctav(90, n)/n**2, 1 - calctav(40, n)
    out = dry*poisson.pmf(0, 2*wetness)
    for layer in range(1, 7):
        film = np.exp(-2*k*.015*layer)
        out = out + poisson.pmf(layer, 2*wetness)*(front + (1 - front)*(1 - back)*film*inside/(1 - back*film*inside))
    return out/poisson.cdf(6, 2*wetness)

def draw(n, rng):
    "Random parameters: even over their ranges, LAI denser at low values, and one in six on an end of its range."
    low, high = np.array(list(LIMITS.values()), float).T
    u = rng.random((n, len(low)))
    u[:, 0] **= 1.5
    ends = rng.random(u.shape) < 1/6
    u[ends] = np.rint(u[ends])
    return low + u*(high - low)

def direct(p, ground=None):
    "PROSPECT-D and 4SAIL at each nm. Per band the terms (rso, T, rdd) and the factor h; with `ground` the band reflectances."
    lai, ala, cab, car, cw, cm, brown, n, sun, view, azimuth, hot = map(float, p)
    s = spectral_lib.prospectd
    leaf = prospect_d(n, cab, car, brown, cw, cm, 0., s.nr, s.kab, s.kcar, s.kbrown, s.kw, s.km, s.kant)
    rho, tau = leaf[1][USED], leaf[2][USED]
    black = np.zeros(len(USED)) if ground is None else ground[USED]
    tss, too, both, rdd, tdd, rsd, tsd, rdo, tdo, rso, *rest = foursail(rho, tau, ala, None, 2, lai, hot, sun, view, azimuth, black)
    if ground is not None: return WEIGHT @ rest[7]
    terms = [rso, (tss + tsd)*(too + tdo), rdd]
    return np.stack([WEIGHT @ np.broadcast_to(t, len(USED)) for t in terms]), both - tss*too

def dataset(n, seed):
    rng = np.random.default_rng(seed); p = draw(n, rng)
    p[:, 0] = np.maximum(p[:, 0], .01)
    terms, h = zip(*(direct(q) for q in p))
    return p.astype('f4'), np.array(terms, 'f4'), np.array(h, 'f4')

def exam(n, seed, spectra):
    "Direct model on fresh draws, even over all ranges, over random soils whose full spectra are used: what the table is judged by."
    rng = np.random.default_rng(seed); low, high = np.array(list(LIMITS.values()), float).T
    p, which, wetness = low + rng.random((n, len(low)))*(high - low), rng.integers(len(spectra), size=n), rng.random(n)
    p[:n//4] = draw(n//4, rng)
    p, wetness, values = p.astype('f4'), wetness.astype('f4'), list(spectra.values())
    return p, which.astype('u1'), wetness, np.array([direct(q, wet(values[i], w)) for q, i, w in zip(p, which, wetness)])

class Net(torch.nn.Module):
    "Features -> terms of all bands: what `crop2seg.canopy.terms` does in numpy."
    def __init__(self, width=96):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(23, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 31)])

    def forward(self, x, lai):
        for f in self.layers[:-1]: y = f(x); x = y*torch.rsqrt(1 + y*y)
        y = self.layers[-1](x)
        y, full = (y + torch.sqrt(y*y + .01))/2, 1 - torch.exp(-lai)
        return full*y[:, :10], full*y[:, 30:], torch.exp(-lai*y[:, 10:20]), full*y[:, 20:30]/(1 + y[:, 20:30])

def train(p, terms, h, epochs, batch=2048):
    "Fit on the reflectance over random soils, relative to its size, so that dark bands count."
    torch.manual_seed(0); torch.set_num_threads(1)
    net, x, lai = Net(), torch.tensor(features(p, ABSORPTION)), torch.tensor(p[:, :1])
    terms, h = torch.tensor(terms), torch.tensor(h)[:, None]
    steps = epochs*(len(p)//batch)
    opt = torch.optim.Adam(net.parameters())
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps, pct_start=.05, final_div_factor=1e3)
    for step in range(steps):
        i, ground = torch.randint(len(p), (batch,)), .02 + .6*torch.rand(batch, 10)
        r, t, d = terms[i].unbind(1)
        truth = over_soil(r, h[i], t, d, ground)
        loss = (((over_soil(*net(x[i], lai[i]), ground) - truth)/(truth + .08))**2).mean()
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), .1)
        opt.step(); plan.step()
        if step % (steps//20) == 0: print(f'{step}/{steps} {loss.item()**.5:.5f}', flush=True)
    return net

def main(n=300_000, epochs=300):
    dry = dry_soils()
    ground = np.array([[RESPONSE @ wet(s, w) for w in WETNESS] for s in dry.values()])
    net = train(*dataset(n, 1), epochs)
    p, which, wetness, truth = exam(4000, 2, dry)
    weights = {f'w{i}': f.weight.detach().numpy().T for i, f in enumerate(net.layers)}
    weights |= {f'b{i}': f.bias.detach().numpy() for i, f in enumerate(net.layers)}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **weights, absorption=ABSORPTION, bands=np.array(BANDS), parameters=np.array(list(LIMITS)),
        limits=np.array(list(LIMITS.values()), 'f4'), soils=np.array(SOILS.index, str), ground=ground.round(5).astype('f4'),
        exam_parameters=p, exam_soil=which, exam_wetness=wetness, exam_truth=np.rint(truth*5e4).astype('u2'))
    under = np.stack([soil(SOILS.index[i], w) for i, w in zip(which, wetness)])
    error = canopy(*p.T[[0, 1, 2, 4, 5, 6, 7]], under, *p.T[[8, 9, 10, 3, 11]]) - truth
    print('RMS', dict(zip(BANDS, np.sqrt((error**2).mean(0)).round(5).tolist())), OUT.stat().st_size, 'bytes')

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
