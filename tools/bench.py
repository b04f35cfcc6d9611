"""Speed of the main steps, as ratios within one run on a simulated season: `make bench`.
Each pair is timed alternately, best of five; only the ratio means something on another machine."""
import json, os, resource, subprocess, sys, tempfile, time, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, odc.stac, pystac, rasterio, torch, pandas as pd, xarray as xr, zarr
from odc.geo.converters import rio_geobox
from rasterio.enums import Resampling
from rasterio.warp import reproject
from scipy.linalg import solveh_banded
import bench_nets
from crop2seg.bands import BANDS, reflectance
from crop2seg.clouds import add_clear
from crop2seg.cube import load_cube, native_grid, open_cube, save_cube, scenes_of
from crop2seg.batches import make_loader
from crop2seg.dataset import CropDataset
from crop2seg.fetch import fetch, fetched_cube
from crop2seg.harmonise import ledger
from crop2seg.legend import read_legend
from crop2seg.mapping import predict_map
from crop2seg.models.zoo import build_model
from crop2seg.parcels import burn, read_parcels
from crop2seg.patches import cut, decode, encode, file_of, finish, lay_out, read_patch, row_of, save_patch, write_dataset
from crop2seg.regular import day_clock, regular
from crop2seg.season import Season
from crop2seg.simulate import simulate
from crop2seg.smooth import stiffness
from crop2seg.stac import band_assets, open_source, search

def race(title, ours, other, rounds=5, work=0):
    "Print how long `ours` takes in units of `other`, and Mpx x dates a second where `work` says how many there are."
    best = [float('inf')] * 2
    for _ in range(rounds):
        for i, f in enumerate((ours, other)):
            t = time.perf_counter(); f(); best[i] = min(best[i], time.perf_counter() - t)
    print(f'{title:<72}{best[0] / best[1]:6.2f}   ({best[0] * 1e3:.0f} ms against {best[1] * 1e3:.0f} ms'
          + (f'; {work / best[0]:.2f} against {work / best[1]:.2f} Mpx x dates/s' if work else '') + ')', flush=True)

def even(dates=61, bands=10, edge=64, steps=24):
    "Filling gaps, and filling with smoothing, of a random cube: ours against xarray and against SciPy pixel by pixel."
    rng = np.random.default_rng(0)
    clock = day_clock(Season(2019, '2018-11-01', '2019-10-31'), 365//steps + 1)
    times = clock.edges[0] + np.sort(rng.choice(365, dates, replace=False))
    x, clear = rng.random((dates, bands, edge, edge), dtype=np.float32), rng.random((dates, edge, edge)) > .5
    cube = xr.Dataset({'reflectance': (('time', 'band', 'y', 'x'), x), 'clear': (('time', 'y', 'x'), clear)},
                      coords={'time': times.astype('datetime64[ns]')})
    centres, work = xr.DataArray(clock.centres, dims='time'), dates*edge*edge/1e6
    lam = stiffness(90/clock.step)
    bend = lam*(lambda d: d.T @ d)(np.diff(np.eye(len(clock)), 2, axis=0))
    theirs = lambda: cube.reflectance.where(cube.clear).interpolate_na('time').interp(time=centres)
    def scipy():
        raw = regular(cube, clock, gaps='keep')
        y, w = raw.reflectance.values, raw.looks.values > 0
        for i in np.ndindex(edge, edge):
            ab = np.stack([np.r_[0, 0, bend.diagonal(2)], np.r_[0, bend.diagonal(1)], bend.diagonal() + w[:, *i]])
            solveh_banded(ab, np.where(w[:, *i, None], y[:, :, *i], 0))
    race(f'even clock, {dates} dates to {len(clock)} steps: regular(linear) / xarray interpolate_na + interp',
         lambda: regular(cube, clock, how='linear', gaps='nan'), theirs, rounds=3, work=work)
    race('even clock: regular(median, smooth) / the same composite smoothed pixel by pixel by SciPy',
         lambda: regular(cube, clock, smooth=90), scipy, rounds=3, work=work)

def windows(items, grid):
    "The cube by hand: a window of each file with rasterio, resampled where it must be, in as many threads as Dask has."
    keys, out = band_assets(items[0]), np.empty((len(items), 10, *grid.shape), 'float32')
    scl = np.empty((len(items), *grid.shape), 'uint8')
    def one(job):
        t, band = job
        with rasterio.open(items[t].assets[keys[band]].get_absolute_href()) as f:
            at = rio_geobox(f)
            if at.resolution == grid.resolution: dn = f.read(1, window=f.window(*grid.boundingbox))
            else: dn, _ = reproject(rasterio.band(f, 1), np.zeros(grid.shape, 'uint16'), src_nodata=0, dst_nodata=0, dst_crs=str(grid.crs),
                                    dst_transform=grid.affine, resampling=Resampling.nearest if band == 'SCL' else Resampling.cubic)
        if band == 'SCL': scl[t] = dn
        else: out[t, BANDS.index(band)] = reflectance(dn)
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(one, [(t, b) for t in range(len(items)) for b in keys]))
    return out, scl

def plain(items, grid):
    "The cube of odc-stac, its numbers turned into the same reflectance."
    keys = band_assets(items[0])
    cube = odc.stac.load(items, bands=list(keys.values()), geobox=grid, groupby='solar_day', chunks={}, nodata=0,
                         dtype='uint16', resampling={keys['SCL']: 'nearest', '*': 'cubic'}).compute()
    return np.stack([reflectance(cube[keys[b]].values) for b in BANDS], 1), cube[keys['SCL']].values.astype('uint8')

def load(items, rows, grid):
    "Ours."
    cube = load_cube(items, rows, grid).compute()
    return cube.reflectance.values, cube.scl.values

def grow(items, folder, edge):
    "A season of scenes of `edge` pixels: a small one, laid again and again like tiles."
    folder.mkdir()
    for item in (items := [i.clone() for i in items]):
        for band, key in band_assets(item).items():
            asset, path = item.assets[key], folder/f'{item.id}.{band}.tif'
            with rasterio.open(asset.get_absolute_href()) as f: values, at = f.read(1), f.transform
            wide = edge * 10 // round(at.a)
            values = np.tile(values, [-(-wide // n) for n in values.shape])[:wide, :wide]
            with rasterio.open(path, 'w', driver='COG', width=wide, height=wide, count=1, dtype=values.dtype, crs=item.properties['proj:code'],
                               transform=at, nodata=0, compress='deflate', predictor=2, blocksize=512, overviews='none') as f: f.write(values, 1)
            asset.href, asset.extra_fields['proj:shape'] = str(path), [wide, wide]
    return items

def peak():
    "Most memory that this process has held so far, MB."
    status = Path('/proc/self/status')                       # Linux's getrusage counts the parent until a child begins
    if status.exists(): return int(next(l for l in status.read_text().splitlines() if l.startswith('VmHWM')).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 1024)

def cost(folder, edge):
    "In a process of its own: bring a place home, put it together, save it; what that takes."
    warnings.simplefilter('ignore')
    items = [pystac.Item.from_dict(d) for d in json.loads((Path(folder)/'items.json').read_text())]
    grid, rows, before = native_grid(items), ledger(items, Season(2019)), peak()
    scenes, start = scenes_of(items, rows), time.perf_counter()
    got = fetch(scenes, grid, (*BANDS, 'SCL'), Path(folder)/'scratch')
    middle = time.perf_counter()
    save_cube(fetched_cube(scenes, grid, BANDS, Path(folder)/'scratch'), Path(folder)/'cube.zarr')
    end, size = time.perf_counter(), len(scenes) * 22 * edge ** 2 / 1e6
    print(f'cube of {edge**2 / 1e4:5.0f} km2, {len(scenes)} dates ({size:.0f} MB): fetched at {size / (middle - start):.0f} MB/s '
          f'({got.bytes.sum() / 1e6:.1f} MB stored), assembled and saved at {size / (end - middle):.0f} MB/s; '
          f'peak memory {peak():.0f} MB, {before:.0f} MB of it before the first byte', flush=True)

def cubes(here):
    "Loading a cube: ours beside two others at equal output, then what 1, 10 and 100 km2 take."
    items = search(open_source(simulate(here/'tile', size=128, dates=12, parcels=60)))
    for edge in (128, 1024):
        large = grow(items, here/f'edge{edge}', edge)
        grid, rows = native_grid(large), ledger(large, Season(2019))
        results = [load(large, rows, grid), plain(large, grid), windows(large, grid)]
        for other in results[1:]: assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(results[0], other))
        ours, odc_, rio = (lambda: load(large, rows, grid)), (lambda: plain(large, grid)), (lambda: windows(large, grid))
        race(f'cube of {edge} px x 12 dates: load_cube / odc.stac.load + compute', ours, odc_, rounds=5 if edge < 500 else 3)
        race(f'cube of {edge} px x 12 dates: load_cube / rasterio, window by window', ours, rio, rounds=5 if edge < 500 else 3)
    for edge in (100, 316, 1000):
        folder = here/f'km{edge}'
        few = grow(items, folder, edge)
        (folder/'items.json').write_text(json.dumps([i.to_dict(include_self_link=False) for i in few]))
        subprocess.run([sys.executable, __file__, 'cost', str(folder), str(edge)], check=True)

class Whole(CropDataset):
    "As the original reads: the file whole, all of it to floating point, then what is wanted of it."
    @staticmethod
    def window(folder, patch_id, dates, rows=slice(None), columns=slice(None)):
        arrays = {k: np.load(file_of(folder, k, patch_id)) for k in ('series', 'clear', 'labels', 'parcels')}
        return dict(x=decode(arrays['series'])[dates][..., rows, columns], clear=arrays['clear'][dates, rows, columns],
                    labels=arrays['labels'][0], parcels=arrays['parcels'])

class Chunked(CropDataset):
    "The same arrays with series and clear in Zarr; `name` says with which chunks."
    name = ''
    def window(self, folder, patch_id, dates, rows=slice(None), columns=slice(None)):
        arrays, group = read_patch(folder, patch_id), zarr.open_group(f'{folder}/{self.name}/{patch_id}.zarr', mode='r')
        return dict(x=decode(group['series'].oindex[dates, :, rows, columns]), clear=group['clear'].oindex[dates, rows, columns],
                    labels=np.asarray(arrays['labels']), parcels=np.asarray(arrays['parcels']))

CHUNKS = {'1 date, 128 px': (1, 10, 128, 128), '1 date, 64 px': (1, 10, 64, 64), '8 dates, 64 px': (8, 10, 64, 64)}

def country(here, patches=24, dates=61):
    "Patches of 128 px and 61 dates, all different: one simulated patch, rolled, and each date brightened a little."
    items = search(open_source(simulate(here/'country', size=128, dates=dates, parcels=60)))
    grid = native_grid(items)
    cube, legend = add_clear(load_cube(items, ledger(items, Season(2019)), grid)).compute(), read_legend()
    labels, ids = burn(read_parcels(here/'country'/'parcels.gpkg', legend), grid, legend.void)
    patch, rng, folder, rows, book = cut(cube, labels, ids, (0, 0), 128, legend.void), np.random.default_rng(0), here/'many', [], []
    series = decode(patch['series'])
    patch |= dict(dates=np.datetime_as_string(np.datetime64('2018-09-01') + 7*np.arange(dates)).tolist())
    again = np.arange(dates) % len(series)                          # a date without a clear pixel was left out
    for k in range(patches):
        spot = rng.integers(128, size=2)
        roll = lambda a: np.roll(a, spot, (-2, -1))
        one = patch | dict(series=encode(roll(series[again])*(1 + .05*rng.standard_normal((dates, 1, 1, 1), dtype='float32'))),
                           **{n: roll(patch[n][again]) for n in ('clear', 'scl') if n in patch}, **{n: roll(patch[n]) for n in ('labels', 'parcels')})
        where = grid.affine * grid.affine.translation(128*k, 0)
        rows.append(row_of(one['labels'], one['parcels'], where, grid.crs.to_epsg(), legend, 1280.))
        book.append(save_patch(folder, rows[-1]['patch_id'], one))
        for name, chunks in CHUNKS.items():
            group = zarr.create_group(f"{folder}/{name}/{rows[-1]['patch_id']}.zarr")
            for n in ('series', 'clear'):
                group.create_array(n, data=one[n], chunks=(*chunks[:1], *chunks[-one[n].ndim + 1:]))
    index = lay_out(rows).merge(pd.DataFrame(book)).assign(season_year=2019, fold=1, set='train')
    finish(folder, index, legend, None, dict(name='many', bands=cube.band.values.tolist(), season_year=2019, patch_size=128, folds=1))
    return folder

def forget(folder):
    "Let the system drop its copy of the files, as after a long night."
    for path in (p for p in Path(folder).rglob('*') if p.is_file()):
        with open(path, 'rb') as f: os.fsync(f.fileno()); os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def readers(here, rounds=3, workers=2):
    "Samples a second of the loader, 16 of 61 dates and a crop of 64 px, from four ways to keep a series."
    folder = country(here)
    ways = {'npy, memory map': CropDataset, 'npy, whole file (the original)': Whole}
    ways |= {f'Zarr, {n}': type('Zarr', (Chunked,), dict(name=n)) for n in CHUNKS}
    size = lambda p: sum(f.stat().st_size for f in p.rglob('*') if f.is_file())/1e6
    npy = size(folder/'DATA_S2') + size(folder/'CLEAR')
    sets = {n: c(folder, dates=16, crop=64) for n, c in ways.items()}
    best = {n: dict(warm=0., cold=0.) for n in sets}
    for k in range(rounds):
        for n, data in sets.items():
            for state in ('cold', 'warm'):
                if state == 'cold': forget(folder)
                data.epoch, t = 2*k + (state == 'warm'), time.perf_counter()
                count = sum(len(b[0]) for b in make_loader(data, 4, workers, shuffle=True))
                best[n][state] = max(best[n][state], count/(time.perf_counter() - t))
    for n, b in best.items():
        disk = size(folder/n.removeprefix('Zarr, ')) if n in ways and n.startswith('Zarr') else npy
        print(f'loader, {workers} workers, 16 of 61 dates x 64 px: {n:<32}{b["warm"]:6.0f} samples/s warm, {b["cold"]:6.0f} from disk; '
              f'{disk/len(data):6.1f} MB a patch', flush=True)

def main():
    warnings.simplefilter('ignore'); torch.set_num_threads(1)
    even()
    legend = read_legend()
    with tempfile.TemporaryDirectory() as tmp:
        here = Path(tmp)
        items = search(open_source(simulate(here/'season', size=128, dates=20, parcels=60)))
        grid, rows = native_grid(items), ledger(items, Season(2019))
        cubes(here)
        readers(here)
        cube = open_cube(save_cube(add_clear(load_cube(items, rows, grid)), here/'cube.zarr'))
        labels, ids = burn(read_parcels(here/'season'/'parcels.gpkg', legend), grid, legend.void)
        folder = write_dataset(cube, labels, ids, here/'patches', legend, 2019, size=64, block=640, folds=2)
        name = CropDataset(folder).index.patch_id[0]
        window = cube.isel(y=slice(0, 64), x=slice(0, 64))
        race('patch of 64 px: numpy memory map / window of the Zarr cube', lambda: np.array(read_patch(folder, name)['series']), lambda: window.reflectance.compute())
        net = build_model('timeunet', n_classes=14).eval()
        x, days, pad = torch.randn(1, 30, 10, 64, 64), torch.arange(30)[None] * 12, torch.zeros(1, 30, dtype=torch.bool)
        half = pad.clone(); half[:, 15:] = True
        with torch.inference_mode(): race('Time-Unet, 30 dates: half of them padding / none', lambda: net(x, days, half), lambda: net(x, days, pad))
        run = dict(bands=cube.band.values.tolist(), legend=legend.to_dict(), model=dict(args=dict(n_classes=14)), stats=dict(mean=[.2] * 10, std=[.1] * 10))
        small = cube.isel(y=slice(0, 96), x=slice(0, 96)).load().assign_attrs(season_year=2019)
        sweep = lambda **kw: lambda: [None for _ in predict_map(small, net, run, **kw)]
        race('map of 96 px: windows of 64 px overlapping by 32 / one window', sweep(window=64, overlap=32), sweep(window=96), rounds=2)
    bench_nets.main()

if __name__ == '__main__':
    if sys.argv[1:2] == ['cost']: cost(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ['readers']:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as tmp: readers(Path(tmp))
    else: main()
