"""Speed, memory and agreement of the three main nets, fast way against plain way: part of `make bench`, or `python tools/bench_nets.py`.
CPU time of one thread, in turn, best of five (61 dates and training: of three); memory in processes of their own. Writes data/results/nets.csv."""
import copy, json, os, subprocess, sys, tempfile, time, warnings
from contextlib import nullcontext
from pathlib import Path
import numpy as np, pandas as pd, torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from crop2seg.clouds import add_clear
from crop2seg.cube import load_cube, native_grid
from crop2seg.harmonise import ledger
from crop2seg.legend import read_legend
from crop2seg.models.seasonal import plainly
from crop2seg.models.timeunet import TimeUNet
from crop2seg.models.utae import UTAE
from crop2seg.models.wtae import WTAE
from crop2seg.parcels import burn, read_parcels
from crop2seg.season import Season
from crop2seg.simulate import simulate
from crop2seg.stac import open_source, search

ROOT = Path(__file__).resolve().parents[1]
KEPT, TABLE = ROOT/'data'/'cache'/'bench', ROOT/'data'/'results'/'nets.csv'
NETS = {'U-TAE': UTAE, 'Time-Unet': TimeUNet, 'W-TAE': WTAE}
FLOORS = {'U-TAE': dict(fp32=2, bf16=3.5, keeping=1.5, step=1.3, memory=420, memory_bf16=220),
          'Time-Unet': dict(fp32=6, bf16=10, keeping=4, step=2, memory=330, memory_bf16=180),
          'W-TAE': dict(fp32=2.2, bf16=3.5, keeping=1.5, memory=310, memory_bf16=170)}
KEEPING = {'GLIBC_TUNABLES': f'glibc.malloc.mmap_threshold={2**32}:glibc.malloc.trim_threshold={2**32}'}  # large blocks are not given back

def say(title, value, wanted='', more=''):
    "One figure and what is wanted of it."
    print(f'{title:<72}{value:>9}   {wanted:<18}{more}', flush=True)

def cpu(f):
    "CPU seconds of a call."
    t = time.process_time(); f(); return time.process_time() - t

def best(ways, rounds=3):
    "Least CPU seconds of each way, tried in turn."
    least = dict.fromkeys(ways, float('inf'))
    for _ in range(rounds):
        for name, f in ways.items(): least[name] = min(least[name], cpu(f))
    return least

def net_of(name):
    "An untrained net, always the same, whose norms have seen something."
    torch.manual_seed(0)
    net = NETS[name](15)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 2)
    return net.eval()

def unfolded(net):
    "A copy whose batch norms stay apart from its convolutions."
    plain = copy.deepcopy(net)
    for m in plain.modules(): m.folds = False
    return plain

def frames(dates, size=128, batch=1):
    "Random frames, their days, no padding."
    g = torch.Generator().manual_seed(dates)
    return torch.randn(batch, dates, 10, size, size, generator=g), torch.arange(dates).repeat(batch, 1)*7, torch.zeros(batch, dates, dtype=torch.bool)

def half_precision(): return torch.autocast('cpu', torch.bfloat16)

def speed(name, dates):
    "CPU seconds of the net: plain, fast, fast in bf16, fast with half of the dates padded; and the largest difference of fast and plain."
    net, (x, days, pad) = net_of(name), frames(dates)
    plain, half = unfolded(net), pad.clone()
    half[:, dates//2:] = True
    def bf16():
        with half_precision(): net(x, days, pad)
    with torch.inference_mode():
        got = best(dict(plain=lambda: plainly(plain, x, days, pad), fast=lambda: net(x, days, pad), bf16=bf16, half=lambda: net(x, days, half)), 5 if dates < 61 else 3)
        return got | dict(differs=(net(x, days, pad) - plainly(plain, x, days, pad)).abs().max().item())

def rate():
    "GFLOP/s of U-TAE at 32 dates, after folding, and of a 3 x 3 convolution 64 to 64 on the frames that it reads at a time."
    net, x = net_of('U-TAE'), frames(32)
    conv, few = torch.nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last), torch.randn(4, 64, 128, 128)
    few = few.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as count: net(*x)
        took = best(dict(net=lambda: net(*x), conv=lambda: [conv(few) for _ in range(8)]), 5)
    return dict(net=count.get_total_flops()/took['net']/1e9, conv=8*4*2*64*64*9*128**2/took['conv']/1e9)

def step(name):
    "CPU seconds of a training step, fast and plain: 4 samples of 32 dates and 64 px."
    net = NETS[name](15).train()
    plain, (x, days, pad) = copy.deepcopy(net), frames(32, 64, 4)
    labels = torch.randint(0, 15, (4, 64, 64), generator=torch.Generator().manual_seed(0))
    def one(m, answer):
        opt = torch.optim.Adam(m.parameters())
        def go(): opt.zero_grad(); F.cross_entropy(answer(), labels).backward(); opt.step()
        return go
    return best(dict(fast=one(net, lambda: net(x, days, pad)), plain=one(plain, lambda: plainly(plain, x, days, pad))))

def memory(name, kind):
    "MB above the model and its input that one pass over 61 dates of 128 px takes; for a process of its own."
    net, x = net_of(name), frames(61)
    held = lambda key: int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key)).split()[1])/1024
    with torch.inference_mode(), half_precision() if kind == 'bf16' else nullcontext():
        net(*frames(2, 32))  # what the libraries take once
        before = held('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
        net(*x)
        return held('VmHWM') - before

def apart(*job, **env):
    "What one of these functions gives in a new process."
    run = subprocess.run([sys.executable, __file__, *map(str, job)], capture_output=True, text=True, env=os.environ | env)
    if run.returncode: raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])

def patch(seed, dates):
    "A simulated season of 128 px: frames as float, days, labels with 255 where there is no parcel."
    legend = read_legend()
    with tempfile.TemporaryDirectory() as tmp:
        items = search(open_source(simulate(Path(tmp)/'season', size=128, dates=dates, parcels=60, seed=seed)))
        grid = native_grid(items)
        cube = add_clear(load_cube(items, ledger(items, Season(2019)), grid)).compute()
        labels, _ = burn(read_parcels(Path(tmp)/'season'/'parcels.gpkg', legend), grid, legend.void)
    x = (np.nan_to_num(cube.reflectance.values) - .2)/.12
    return torch.from_numpy(x.astype('float32')), torch.from_numpy(Season(2019).days(cube.time.values).astype('int64')), torch.from_numpy(np.where(labels == legend.void, 255, labels).astype('int64'))

def patches(count=5):
    "Simulated seasons: one to be judged by, the others to learn from; kept."
    KEPT.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        if (path := KEPT/f'patch-{seed}.safetensors').exists(): continue
        save_file(dict(zip(('x', 'days', 'labels'), (a.contiguous() for a in patch(seed, 24 if seed else 32)))), path)
    return [tuple(load_file(KEPT/f'patch-{seed}.safetensors')[k] for k in ('x', 'days', 'labels')) for seed in range(count)]

def trained(name, steps=120):
    "A net after some steps on crops of 32 px and 8 dates; its weights are kept."
    net, path = net_of(name), KEPT/f"{name.lower().replace('-', '')}-{steps}.safetensors"
    if path.exists():
        net.load_state_dict(load_file(path))
        return net
    seasons, rng = patches()[1:], np.random.default_rng(0)
    def crop():
        x, days, labels = seasons[rng.integers(len(seasons))]
        t = np.sort(rng.choice(len(days), 8, replace=False))
        while True:  # until there are parcels in it
            r, c = rng.integers(0, 97, 2)
            if (labels[r:r + 32, c:c + 32] < 255).float().mean() > .3: return x[t, :, r:r + 32, c:c + 32], days[t], labels[r:r + 32, c:c + 32]
    opt = torch.optim.Adam(net.train().parameters(), 2e-3)
    for _ in range(steps):
        x, days, labels = map(torch.stack, zip(*[crop() for _ in range(4)]))
        opt.zero_grad(); F.cross_entropy(net(x, days, torch.zeros(days.shape, dtype=torch.bool)), labels, ignore_index=255).backward(); opt.step()
    save_file(net.state_dict(), path)
    return net.eval()

def agreement(name):
    "On a trained net and a season that it never saw: fast against plain, bf16 against fp32, and how often it is right."
    net, (x, days, labels) = trained(name), patches()[0]
    x, days, pad = x[None], days[None], torch.zeros(1, len(days), dtype=torch.bool)
    with torch.inference_mode():
        fast, plain = net(x, days, pad), plainly(unfolded(net), x, days, pad)
        with half_precision(): short = net(x, days, pad)
    same = lambda a, b: (a.argmax(1) == b.argmax(1)).float().mean().item()
    known = labels < 255
    return dict(differs=((fast - plain).abs().max()/plain.abs().max()).item(), same=same(fast, plain), same_bf16=same(short.float(), fast),
                right=(fast[0].argmax(0) == labels)[known].float().mean().item())

def compare(name):
    "All figures of a net; its rows of the table."
    rows, wanted = [], FLOORS[name]
    for dates in (32, 61):
        got, keeping = apart('speed', name, dates), apart('speed', name, dates, **KEEPING)
        ratio = lambda key, of=got: of['plain']/of[key]
        head = f'{name}, {dates} dates: '
        say(head + 'plain / fast', f'{ratio("fast"):.2f}', f">= {wanted['fp32']}", f"({got['plain']*1e3:.0f} ms against {got['fast']*1e3:.0f} ms)")
        say(head + 'plain / fast in bf16', f'{ratio("bf16"):.2f}', f">= {wanted['bf16']}", f"({got['bf16']*1e3:.0f} ms)")
        say(head + 'plain / fast, large blocks kept on both sides', f"{ratio('fast', keeping):.2f}", f">= {wanted['keeping']}",
            f"({keeping['plain']*1e3:.0f} ms against {keeping['fast']*1e3:.0f} ms; bf16 {ratio('bf16', keeping):.2f})")
        say(head + 'half of them padding / none', f"{got['half']/got['fast']:.2f}", 'about .5')
        say(head + 'largest difference of fast and plain, untrained', f"{got['differs']:.1e}", '<= 1e-5')
        rows.append(dict(net=name, dates=dates, fp32=ratio('fast'), bf16=ratio('bf16'), keeping=ratio('fast', keeping), keeping_bf16=ratio('bf16', keeping),
                         half=got['half']/got['fast'], plain_ms=got['plain']*1e3, fast_ms=got['fast']*1e3, bf16_ms=got['bf16']*1e3, differs=got['differs']))
    taken = {kind: apart('memory', name, kind) if sys.platform == 'linux' else float('nan') for kind in ('fp32', 'bf16')}
    say(f'{name}, 61 dates: MB above the model, fp32', f"{taken['fp32']:.0f}", f"< {wanted['memory']}")
    say(f'{name}, 61 dates: MB above the model, bf16', f"{taken['bf16']:.0f}", f"< {wanted['memory_bf16']}")
    learns = apart('step', name)
    say(f'{name}, training step of 4 x 32 dates x 64 px: plain / fast', f"{learns['plain']/learns['fast']:.2f}",
        f">= {wanted['step']}" if 'step' in wanted else '', f"({learns['plain']*1e3:.0f} ms against {learns['fast']*1e3:.0f} ms)")
    agree = agreement(name)
    say(f'{name}, trained, season not seen: largest difference / largest logit', f"{agree['differs']:.1e}", '<= 1e-4', f"(right on {agree['right']:.0%} of the parcels)")
    say(f'{name}, trained: pixels with the same class, fast and plain', f"{agree['same']:.2%}", '100 %')
    say(f'{name}, trained: pixels with the same class, bf16 and fp32', f"{agree['same_bf16']:.2%}", '>= 99.5 %')
    rows[-1] |= dict(memory=taken['fp32'], memory_bf16=taken['bf16'], step=learns['plain']/learns['fast'], trained_differs=agree['differs'],
                     same=agree['same'], same_bf16=agree['same_bf16'])
    return rows

def main():
    rows = [row for name in NETS for row in compare(name)]
    got = apart('rate')
    say('U-TAE, 32 dates: useful GFLOP/s as a share of a 64 to 64 convolution', f"{got['net']/got['conv']:.2f}", '>= 0.7', f"({got['net']:.0f} of {got['conv']:.0f} GFLOP/s)")
    rows[0]['share'] = got['net']/got['conv']
    pd.DataFrame(rows).to_csv(TABLE, index=False, float_format='%.4g')

if __name__ == '__main__':
    warnings.simplefilter('ignore'); torch.set_num_threads(1)
    job = sys.argv[1:]
    if not job: main()
    elif job[0] == 'speed': print(json.dumps(speed(job[1], int(job[2]))))
    elif job[0] in ('memory', 'step', 'rate'): print(json.dumps(globals()[job[0]](*job[1:])))
    else: raise SystemExit(f'there is no part {job[0]}; take none, speed, memory, step or rate')
